"""Which stores for conversations there are."""

from __future__ import annotations

from stateset_ray.errors import ConfigError
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.serving.sqlite_store import SqliteStore
from stateset_ray.serving.store import Store

__all__ = ["open_store"]


def open_store(settings: ConversationSettings) -> Store | None:
    """The store that the settings name; None for none.

    Raises:
        ConfigError: it cannot be opened, or needs a package that is not installed.
    """
    if not settings.store:
        return None
    if settings.store.startswith("sqlite:"):
        return SqliteStore(settings)
    try:
        from stateset_ray.serving.redis_store import RedisStore
    except ImportError as error:
        raise ConfigError(
            "conversations in Redis need a package that is not installed", given="redis",
            mend="pip install 'stateset-ray[redis]'",
        ) from error  # fmt: skip
    return RedisStore(settings)
