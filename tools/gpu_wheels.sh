#!/usr/bin/env bash
# Download what a machine with a GPU lacks, if it has Python 3.12, torch and transformers and no network: 16 wheels, about 8 MB.
# tools/gpu_probe.py, which tools/gpu_check.sh calls, unpacks them.
# Usage: tools/gpu_wheels.sh FOLDER      (PYTHON is an interpreter with pip; default python3)
set -euo pipefail
folder=${1:?Usage: tools/gpu_wheels.sh FOLDER}
wheels=(
    zarr==3.4.2 numcodecs==0.17.1 google-crc32c==1.9.0 donfig==0.8.1.post1 msgspec==0.22.0
    compressed-tensors==0.20.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 loguru==0.7.3
    gguf==0.19.0 pytest==9.0.2 iniconfig==2.3.0 pluggy==1.6.0 pygments==2.19.2
)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
mkdir -p "$folder"
"${PYTHON:-python3}" -m pip download --quiet --dest "$folder" --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" "${wheels[@]}"
found=$(find "$folder" -name '*.whl' | wc -l)
echo "$found wheels in $folder"
[ "$found" -ge "${#wheels[@]}" ]
