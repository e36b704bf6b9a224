"""The service, in rooms. Each room imports only from the rooms below it.

http       routes, callers, the request handler, the log, `/config` and the web demo
pipeline   one request: parse, prepare, forward, render
devices    the queue of jobs, and one thread for each device
admission  slots, readers, bytes in flight and deadlines
vae        the model: weights, modes, memory, and passes of our own (`fast`)
media      bytes to tensors and back: images, videos, latents, pixels
settings   environment variables
metrics    counters and histograms for Prometheus
layout     the shapes of a VAE's tensors
limits     what a request may cost
errors     the one exception for a wrong request

`http` alone knows HTTP, and it knows no torch. docs/architecture.md follows a request through the rooms.
"""
