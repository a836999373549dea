"""The policy deployment: what Serve is told of the replicas that hold the model."""

from __future__ import annotations

from typing import Any

from ray import serve

from stateset_ray.serving.replica import PolicyReplica
from stateset_ray.serving.settings import SERVE_LOGGING, STEADY_MEMORY, ServeSettings

__all__ = ["policy_deployment"]

_ENVIRONMENT = {
    **STEADY_MEMORY,  # but tensors are large, and limits as in an ingress would cost time
    # A run lets idle threads of OpenMP sleep, since its learner and workers take turns. An answer's products
    # follow each other so closely that a thread which has to be woken for each comes too late.
    "GOMP_SPINCOUNT": "300000",
    # How long a question may be is the endpoint's to say (`limits`, `conversations`), and not the channel's:
    # its 4 MiB would be a failure of the server. The side that receives decides; answers come in parts.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),
}


class _Policy(PolicyReplica):
    """What Serve builds; its constructor ends when the policy can answer."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(settings)
        await self.start()


def policy_deployment(settings: ServeSettings) -> Any:
    """The deployment of the policy, with all that the settings say of it."""
    policy, scaling = settings.policy, settings.autoscaling
    options: dict[str, Any] = {"num_replicas": policy.replicas}
    if scaling.max_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "initial_replicas": min(max(policy.replicas, scaling.min_replicas), scaling.max_replicas),
                "max_replicas": scaling.max_replicas,
                "upscale_delay_s": scaling.upscale_delay,
                "downscale_delay_s": scaling.downscale_delay,
                "metrics_interval_s": scaling.interval,
                "look_back_period_s": max(2 * scaling.interval, 4.0),
                "policy": {
                    "policy_function": "stateset_ray.serving.autoscaling:TokensPerReplica",
                    "policy_kwargs": {"target": scaling.target_tokens},
                },
            }
        }
    return serve.deployment(
        _Policy,
        name="Policy",
        ray_actor_options={
            "num_cpus": policy.cpus,
            "num_gpus": policy.gpus,
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        max_ongoing_requests=policy.ongoing,
        max_queued_requests=policy.queued,
        max_surge_percent=policy.surge,
        graceful_shutdown_timeout_s=settings.deadlines.drain,
        logging_config=SERVE_LOGGING,
        request_router_config={
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            # Where a conversation's own replica is full or dead, the next on the ring answers it.
            "request_router_kwargs": {"num_fallback_replicas": max(2, settings.most_replicas)},
        },
        **options,
    )
