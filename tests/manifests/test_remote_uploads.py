"""An upload that does not come to its end leaves what was there before, not half of what was to come."""

import gc
import subprocess
import sys

import pytest

from manifests.errors import StorageError
from manifests.storage import Store

INTERRUPTED = """
import io, os, signal, sys
from manifests.storage import Store

class Interrupted(io.BytesIO):
    \"\"\"Ctrl-C comes when two pieces are uploaded and a third is asked for.\"\"\"

    def read(self, size):
        if self.tell() >= 16 << 20:
            os.kill(os.getpid(), signal.SIGINT)
        return super().read(size)

store = Store.open(sys.argv[1])
for name in ("old", "new"):
    try:
        store.write(name, Interrupted(bytes(40 << 20)))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupted_upload_leaves_what_was_there(s3):
    """Also when the writer ends as programs do, which closes what is open."""
    store = Store.open(s3)
    store.write("old", b"1")
    writer = subprocess.run([sys.executable, "-c", INTERRUPTED, s3], capture_output=True, text=True, check=True)
    assert writer.stdout == "interrupted\n" * 2
    assert writer.stderr == ""
    assert store.list() == ["old"]
    assert store.read("old") == b"1"


def test_an_upload_that_the_store_refused_is_not_completed_later(s3, s3_server):
    """When the bucket is back, and Python clears away what the failed write has left."""
    store, bucket = Store.open(s3), s3.split("/")[2]
    s3_server.client().delete_bucket(Bucket=bucket)
    with pytest.raises(StorageError, match="the bucket does not exist") as refused:
        store.write("x", bytes(11 << 20))
    s3_server.client().create_bucket(Bucket=bucket)
    del refused
    gc.collect()
    assert store.list() == []
