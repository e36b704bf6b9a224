"""Stand-in for what `clients/comfyui` uses of ComfyUI. `comfyui_run.py` runs the real one."""
