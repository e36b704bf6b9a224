"""Hostile and heavy traffic against a real server: `make fuzz` and `make soak`.

`samples` are good requests, `mutations` makes malformed ones of them, `images` and `videos` make mutated files, `files`
reads files without the service, `truth` knows what is a right answer, `clients` send them well and badly, `fuzz` and
`soak` are the two runs, and `report` is what they print and write.
"""
