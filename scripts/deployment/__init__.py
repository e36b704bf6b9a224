"""The parts of `scripts/deploy.py`, a module a noun:

plan        what was asked for: checked, with every default filled in
hardware    where there is a machine for it
texts       the longer texts, from `templates/`: the plan, the model card
account     the token and what it may do
repository  the repository on the Hub, and what goes into it
endpoint    the endpoint: create, update, wait, pause, delete
calls       requests to Hugging Face: retries, and failures in one line
"""
