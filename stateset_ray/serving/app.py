"""The application that Serve runs: `import_path: stateset_ray.serving.app:build`, args: `ServeSettings`."""

from typing import Any

from stateset_ray.serving.ingress import ingress_deployment
from stateset_ray.serving.policy_deployment import policy_deployment
from stateset_ray.serving.settings import ServeSettings

__all__ = ["build"]


# Serve reads the annotation itself, so it must be the class and not its name.
def build(args: ServeSettings) -> Any:
    """The ingress in front of the policy.

    Args:
        args: of the endpoint; Serve makes them from the `args` of a YAML file and refuses unknown ones.
    """
    return ingress_deployment(args).bind(args, policy_deployment(args).bind(args))
