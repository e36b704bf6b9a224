"""The benchmark, beside its results: `make bench` runs `bench`, which has the plan and the order of the measurements.

`forward` compares the VAE with plain diffusers. `service` and `clients` measure the service over HTTP. `peak` and
`memory` count bytes. `report` writes the page of a machine.
`published_sizes` starts every model with random weights.
"""
