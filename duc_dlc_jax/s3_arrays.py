"""Lets Orbax store arrays in `s3://`: Orbax itself describes only disks and `gs://` to TensorStore.

TensorStore has a driver for either store. Its S3 driver reads credentials as the AWS tools do, but
neither AWS_ENDPOINT_URL nor a region, which are therefore put into its description here.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

# Of a request that fails; the waits double from the first to the last one's length. TensorStore's
# own 32 would let a run wait a quarter of an hour for a store that is gone.
RETRIES = "DUC_DLC_STORE_RETRIES"
DEFAULT_RETRIES = 8  # about a minute


def retries() -> dict[str, Any]:
    """TensorStore's resource: how often a request is tried again."""
    count = int(os.environ.get(RETRIES) or DEFAULT_RETRIES)
    return {"max_retries": count, "initial_delay": "500ms", "max_delay": "16s"}


def kvstore(bucket: str, path: str) -> dict[str, Any]:
    """TensorStore's description of a prefix of a bucket."""
    env = os.environ.get
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    endpoint = env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    region = env("AWS_REGION") or env("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if env("AWS_ACCESS_KEY_ID"):  # else its search says on stderr what it does not find
        spec["aws_credentials"] = {"type": "environment"}
    return spec | {"s3_request_retries": retries()}


def _completed(spec: Any, scheme: str) -> Any:
    """Orbax's description for `gs://`, with the store and the patience that are wanted."""
    if isinstance(spec, list):
        return [_completed(part, scheme) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") == "gcs":
        if scheme == "s3":
            return kvstore(spec["bucket"], spec["path"])
        return spec | {"gcs_request_retries": retries()}
    return {name: _completed(part, scheme) for name, part in spec.items()}


def enable() -> None:
    """Makes Orbax take `s3://` paths; calling it again changes nothing."""
    original = tensorstore_utils.build_kvstore_tspec
    if hasattr(original, "takes_s3"):
        return

    @functools.wraps(original)
    def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        scheme, _, rest = str(directory).partition("://")
        if scheme not in ("s3", "gs"):
            return original(directory, *args, **kwargs)
        return _completed(original(f"gs://{rest}", *args, **kwargs), scheme)

    build.takes_s3 = True  # type: ignore[attr-defined]
    tensorstore_utils.build_kvstore_tspec = build
