"""The version of the service and of the package `remote_vae`."""

VERSION = "0.1.0"
