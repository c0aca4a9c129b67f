"""An S3-compatible server as a process of its own on the loopback, with what a test needs to make it misbehave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from types import TracebackType
from typing import Any

import boto3
from botocore.config import Config


class S3Server:
    """Starts with the `with` block and ends with it. Buckets are gone with the server."""

    def __init__(self, free_requests: int | None = None) -> None:
        """`free_requests`: so many requests are let through before credentials are looked at; None: always."""
        self._own = {} if free_requests is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(free_requests)}

    def __enter__(self) -> S3Server:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | self._own)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"Running on (http://[\d.:]+)", line):
                self.endpoint = found[1]
                break
        else:
            raise RuntimeError("the S3 server did not start")
        # Its log goes nowhere from here on; a full pipe would stop it.
        self._drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        self.process.stderr.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on()
        self.process.kill()
        self.process.wait()
        self._drain.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server and nothing else."""
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str = "s3") -> Any:
        """A boto3 client, to do what the project itself never does."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",  # noqa: S106
            config=Config(retries={"max_attempts": 1}),
        )

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def suspend(self) -> None:
        """From here on the server accepts connections and says nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)
