"""The benchmark, beside its results: `make bench` runs `bench`, the plan and the order of what is measured.

`forward` is the VAE itself beside plain diffusers, `ways` the ways to run it, `service` and `clients` the service over
HTTP, `streams` a video that is streamed, `pilot` the plain handler that the service is compared with; `peak` and
`memory` count bytes. `report` writes a machine's page, with `seeds` for what the pilot measured.
"""
