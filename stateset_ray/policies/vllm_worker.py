"""What vLLM's workers can do besides: taking weights, the output layer of a CPU model included.

vLLM adds this class to its own worker's (`worker_extension_cls`), in its own processes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TakesWeights"]


class TakesWeights:
    """Mixed into vLLM's worker, whose `device`, `model_runner` and `reload_weights` it uses."""

    device: Any
    model_runner: Any
    reload_weights: Any

    def take_weights(self, folder: str) -> None:
        """Replace the model's weights in place by the safetensors in a folder."""
        self.reload_weights(weights_path=folder)
        if self.device.type != "cpu":
            return
        # An output layer that is tied to the embedding is not in the files, so vLLM does not process it
        # again; but on CPUs it multiplies by a packed copy of the weights, which would stay the old ones.
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
