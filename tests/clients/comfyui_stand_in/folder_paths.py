"""Where ComfyUI keeps a user's settings."""

user_directory = ""


def get_user_directory() -> str:
    return user_directory
