"""The trained policy behind an endpoint: Ray Serve deployments and what they are made of.

    client -- HTTP, SSE --> Ingress (FastAPI, no model) -- handle --> PolicyReplica (engine, batched)

`app` puts the two together; `protocol`, `security`, `rates`, `autoscaling` and `deploy_file` need neither Ray
nor torch. The verb is `stateset_ray.serve`.
"""
