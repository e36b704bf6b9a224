#!/usr/bin/env bash
# Build the container image with docker, or with buildah if no docker runs. The arguments are those of `docker build`.
set -euo pipefail
cd "$(dirname "$0")/.."
if docker info >/dev/null 2>&1; then
    exec docker build "$@" .
fi
if ! command -v buildah >/dev/null; then
    echo "error: no docker runs here, and there is no buildah; install one of them" >&2
    exit 1
fi
exec buildah build --format docker --layers "$@" . # docker's format has the health check
