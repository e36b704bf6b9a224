"""The way of a request. Each stage is a module, and imports only from those below it:

app       HTTP: routes, errors, the way down
page      what a browser gets at the root
exchange  an HTTP request and its answer: the way of it, stage by stage
access_log  a request's id, its line in the log, its counters
callers   pages of other origins, and foreign names of this server
description  what is served, for clients that ask
pipeline  one request, from its payload to its answer
machine   what several models share: devices, places
worker    the devices' threads and the queue in front of them
output    tensors to the bytes of pictures, videos and tensors
stream    a file's bytes, read while they are written
vae       the model: weights, device, its passes in each mode
probe     what a loaded model's tensors look like, without running it
fast_check  whether the fast pass may be used: tried on the device
fused     the fast pass on a GPU
spans     a video's frames, as soon as they are decoded
autoencoder  diffusers' autoencoders, all called alike
fast      the fast pass: the same algebra with less arithmetic
kernels   what the fast pass runs on a GPU, in Triton
low_memory  the pass in half the memory
coders    what encoders and decoders are made of, for passes of our own
stop      the end of a pass that nobody waits for
heap      what of the freed memory is kept for the next pass
memory    what a pass needs, and in which mode it fits in what is free
pixels    value range and layout of pixels
normalization  range of latents
latents   layout of latents
mp4       MP4 files to the frames of their video
frames    the frames of an MP4 file, decoded in a process of its own
payload   bytes to tensors and images
image_files  the structure of PNG, JPEG and WebP files
layout    the shapes of a VAE's tensors
request   what was asked for, validated
hub       a checkpoint's files on the Hub
metrics   counters and histograms for Prometheus
settings  environment variables
admission  the bytes that requests have in memory
limits    what a request may cost
errors    the one exception for a wrong request
"""
