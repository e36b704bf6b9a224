"""Hostile and heavy traffic against a real server: `make fuzz` and `make soak`.

- `samples` builds good requests. `mutations` makes malformed requests from them.
- `images` and `videos` make mutated files. `files` reads files without the service.
- `truth` checks responses. `clients` send requests well and badly.
- `fuzz` and `soak` are the two runs. `report` formats their results.
"""
