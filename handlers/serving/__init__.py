"""The service. Each module or package imports only from those below it.

http       routes, callers, the request handler, the access log, `/config` and the web demo
pipeline   the stages of a request: parse, prepare, forward, render
devices    the queue of jobs, and a thread for each device
admission  slots, readers, bytes in flight and deadlines
vae        the model: weights, modes, memory, and the fast pass (`fast`)
media      bytes to tensors and back: images, videos, latents, pixels
settings   environment variables
metrics    counters and histograms for Prometheus
layout     the shapes of a VAE's tensors
limits     limits of a request
errors     the exception for a wrong request

Only `http` knows HTTP, and it does not use torch. docs/architecture.md follows a request through the code.
"""
