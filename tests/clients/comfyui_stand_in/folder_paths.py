"""Folder of ComfyUI's user settings."""

user_directory = ""


def get_user_directory() -> str:
    return user_directory
