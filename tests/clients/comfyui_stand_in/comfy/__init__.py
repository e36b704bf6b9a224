"""Of ComfyUI what `clients/comfyui` imports, as far as its nodes use it; `comfyui_run.py` runs the real one."""
