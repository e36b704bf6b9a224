"""The parts of `scripts/deploy.py`, a module a noun:

plan        what was asked for: checked, with every default filled in
hardware    the machines: what they cost, what they hold, where there is one
card        the model card of the endpoint's repository, and the code that calls an endpoint
account     the token and what it may do
repository  the repository on the Hub, and what goes into it
endpoint    the endpoint: create, update, wait, pause, delete
smoke       one picture through a live endpoint and back
calls       requests to Hugging Face: retries, and failures in one line
console     where it is printed
"""
