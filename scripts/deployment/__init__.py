"""The parts of `scripts/deploy.py`, one noun a module:

plan        the options, checked, with every default filled in
hardware    the region and the price of a plan's instance
texts       the longer texts, from `templates/`: the plan, the model card
account     the token and its permissions
repository  the repository on the Hub and its files
endpoint    the endpoint: create, update, wait, pause, delete
calls       requests to Hugging Face: retries, and one-line errors
"""
