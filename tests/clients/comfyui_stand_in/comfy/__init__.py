"""Stand-in for the functions of ComfyUI that `clients/comfyui` uses. `comfyui_run.py` runs the real one."""
