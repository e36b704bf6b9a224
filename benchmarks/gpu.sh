#!/usr/bin/env bash
# All that only a GPU can tell, on a machine that has one, in the project's root: `benchmarks/gpu.sh [tests|bench]`.
#
# Takes the Python that is there (PYTHON=...) with its torch, and wheels of what else is needed from the folder `wheels`
# where there is one. For a machine without a network, with torch, Triton, transformers and huggingface_hub, it is made by
#
#   pip download -d wheels --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#     --only-binary=:all: --no-deps diffusers==0.42.1 av isal starlette uvicorn h11 pydantic pydantic-core annotated-types \
#     typing-inspection typing-extensions rich markdown-it-py mdurl pygments tenacity importlib_metadata zipp \
#     prometheus-client typer annotated-doc shellingham click httpx2 httpcore2 truststore idna anyio python-multipart \
#     einops pytest pytest-timeout pluggy iniconfig
#
# Results are written to benchmarks/<name of the GPU>/; copies go to $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ -d wheels ]; then
    $python -m pip install --quiet --no-index --find-links wheels wheels/*.whl || exit 1
fi

status=0
if [ "${1:-tests}" = tests ]; then
    TRITON_INTERPRET=0 $python -m pytest tests/gpu.py tests/serving/test_fast.py -q -s -p no:cacheprovider
    status=$?
fi
if [ "${1:-bench}" = bench ]; then
    $python -m benchmarks.bench --device cuda || status=1
    [ -n "${OUT:-}" ] && cp -r benchmarks "$OUT"
fi
exit "$status"
