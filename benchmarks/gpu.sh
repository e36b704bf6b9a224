#!/usr/bin/env bash
# The tests and the benchmark that need a GPU. Run it in the project's root: `benchmarks/gpu.sh [tests|bench]`.
#
# It uses the installed Python (PYTHON=...) with its torch, and installs wheels from the folder `wheels` if that exists. A
# machine without a network needs torch, Triton, transformers and huggingface_hub, and this folder:
#
#   pip download -d wheels --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#     --only-binary=:all: --no-deps diffusers==0.42.1 av isal starlette uvicorn h11 pydantic pydantic-core annotated-types \
#     typing-inspection typing-extensions rich markdown-it-py mdurl pygments tenacity importlib_metadata zipp \
#     prometheus-client typer annotated-doc shellingham click httpx2 httpcore2 truststore idna anyio python-multipart \
#     einops pytest pytest-timeout pluggy iniconfig
#
# The results are in benchmarks/<name of the GPU>/. Copies go to $OUT if that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ -d wheels ]; then
    $python -m pip install --quiet --no-index --find-links wheels wheels/*.whl || exit 1
fi

status=0
if [ "${1:-tests}" = tests ]; then
    TRITON_INTERPRET=0 $python -m pytest tests/test_gpu.py tests/serving/test_fast.py -q -s -p no:cacheprovider
    status=$?
fi
if [ "${1:-bench}" = bench ]; then
    $python -m benchmarks.bench --device cuda || status=1
    [ -n "${OUT:-}" ] && cp -r benchmarks "$OUT"
fi
exit "$status"
