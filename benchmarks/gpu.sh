#!/usr/bin/env bash
# Two calls of at most 300 s each decide what only a GPU can. Run them in the project's root:
#
#   benchmarks/gpu.sh wheels    fetch the wheels that the machine needs into the folder `wheels`, on one with a network
#   benchmarks/gpu.sh first     the kernels, the passes of FLUX.2 and their profile, and the tests of every mode
#   benchmarks/gpu.sh second    FLUX.2 and Stable Diffusion, Wan, copies to the device, and the service over HTTP
#
# The machine needs Python 3.12 (PYTHON=...) with these packages: torch, triton, transformers, huggingface-hub, accelerate,
# anyio, click, einops, filelock, h11, httpx, matplotlib, pillow, prometheus-client, psutil, pytest, pytest-timeout,
# requests, rich, typer, zipp.
# It needs no network if the folder `wheels` is there. Results go to the folder $OUT, each as soon as it is known.
# DEVICE=cpu runs the same at toy sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
call=${1:-}
[ "$device" = cpu ] && export TRITON_INTERPRET=1  # runs the kernels without a GPU, slowly
export OUT=${OUT:-.} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

case $call in
wheels)
    # Without dependencies, because the machine has the others.
    exec "$python" -m pip download --dest wheels --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        diffusers==0.42.1 av==18.1.0 isal==1.9.1 starlette==1.10.0 uvicorn==0.54.0 httptools==0.9.0 pydantic==2.14.4 \
        pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0 tenacity==9.2.1 \
        importlib_metadata==10.2.0 lazy-importer==0.1.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 \
        python-multipart==0.0.34 idna==3.20
    ;;
first | second) ;;
*)
    sed -n '4,6s/^# *//p' "$0" >&2
    exit 2
    ;;
esac

if [ -d wheels ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" wheels/*.whl || exit 1
    export PYTHONPATH=$site
fi

measure() {  # seconds, stages, options
    timeout $(($1 + 10)) "$python" -m benchmarks.gpu "$2" --seconds "$1" --device "$device" "${@:3}"
}

{
    if [ "$call" = first ]; then
        measure 180 environment,kernels,passes,attention,upsampling,convolutions --models "${MODELS:-flux2}"
        VAE_TEST_DEVICE=$device TRITON_INTERPRET=0 timeout 95 "$python" -m pytest tests/test_gpu.py -q -s -W default \
            -p no:cacheprovider -k "(every_mode and not over_http) or out_of_memory"
    else
        measure 115 environment,transfers,passes --models "${MODELS:-flux2,sd-v1}"
        measure 75 wan,videos
        measure 65 service
    fi
} 2>&1 | tee "$OUT/gpu-$call.log"
