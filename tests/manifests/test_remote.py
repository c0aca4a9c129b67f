"""What a URL means, and what an object store that refuses or is gone comes to: one sentence, soon."""

import json
import re
import time

import pyarrow as pa
import pytest
from s3_server import S3Server

from manifests import remote
from manifests.errors import AsvrError, EnvironmentProblem, StorageError
from manifests.remote_errors import client_errors, sentence
from manifests.storage import FileStat, Store

SECRET = "wJalrXUtnFEMI"  # noqa: S105

ATTEMPTS = {
    "read": lambda store: store.read("x"),
    "read a part of": lambda store: store.read_range("x", 0, 1),
    "open": lambda store: store.open_input("x"),
    "look at": lambda store: store.stat("x"),
    "ask for": lambda store: store.exists("x"),
    "size": lambda store: store.size("x"),
    "sizes": lambda store: store.sizes(["x"] * 9),
    "many": lambda store: list(store.read_many(["x"])),
    "list": lambda store: store.list(),
    "write": lambda store: store.write("x", b""),
    "append to": lambda store: store.append("x", b""),
    "delete": lambda store: store.delete("x"),
    "owner": lambda store: store.lease_owner(),
    "lease": lambda store: store.lease("test").__enter__(),
}


def refusal(store: Store, attempt: str) -> str:
    with pytest.raises(StorageError) as caught:
        ATTEMPTS[attempt](store)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert "Request ID" not in message
    assert SECRET not in message
    return message


@pytest.mark.parametrize("attempt", ["ask for", "lease", "list", "many", "open", "owner", "read", "sizes", "write"])
def test_a_server_that_is_not_there_is_one_sentence(s3, monkeypatch, attempt):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    began = time.monotonic()
    message = refusal(Store.open("s3://bucket/x"), attempt)
    assert "the server cannot be reached" in message
    assert "s3://bucket/x" in message
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("attempt", ["read", "list", "write", "lease"])
def test_a_server_that_says_nothing_is_not_waited_for_for_ever(monkeypatch, attempt):
    """With a shorter patience than in earnest: three attempts of 10 s."""
    assert remote.ATTEMPTS * remote.REQUEST_TIMEOUT_S < 45
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 1)
    with S3Server() as silent:
        for name, value in silent.environment.items():
            monkeypatch.setenv(name, value)
        store = Store.open(f"s3://{silent.bucket()}/x")
        store.write("x", b"1")
        silent.suspend()
        began = time.monotonic()
        assert "the server cannot be reached" in refusal(store, attempt)
        assert time.monotonic() - began < 15
        silent.go_on()
        assert store.read("x") == b"1"


def test_a_bucket_that_vanishes_is_one_sentence(s3, s3_server):
    store = Store.open(s3)
    store.write("x", b"1")
    delete_bucket(s3_server.client(), s3.split("/")[2])
    for attempt in ("write", "lease", "append to", "read", "open", "size", "many"):
        assert "the bucket does not exist" in refusal(store, attempt)
    with pytest.raises(StorageError, match="the bucket does not exist"):  # it is not an empty one
        store.list()


def test_what_the_credentials_do_not_allow_is_one_sentence(monkeypatch):
    """A user who may read but not write, and one whom the server does not know."""
    with S3Server(free_requests=6) as server:
        bucket, access = server.bucket(), server.client("iam")
        server.client().put_object(Bucket=bucket, Key="below/x", Body=b"1")
        access.create_user(UserName="reader")
        key = access.create_access_key(UserName="reader")["AccessKey"]
        allowed = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        access.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
        server.client().head_bucket(Bucket=bucket)  # the last free request

        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        store = Store.open(f"s3://{bucket}/below")
        assert store.read("x") == b"1"
        assert store.list() == ["x"]
        for attempt in ("write", "delete", "append to", "lease"):
            message = refusal(store, attempt)
            assert "access is denied" in message
            assert "check the credentials" in message
        assert store.lease_owner() is None

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        stranger = Store.open(f"s3://{bucket}/below")
        for attempt in ("read", "list", "look at", "write"):
            assert "access is denied" in refusal(stranger, attempt)


def test_settings_of_the_aws_configuration_file_count(s3_server, tmp_path, monkeypatch):
    bucket = s3_server.bucket()
    for name in s3_server.environment:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(
        f"[profile mine]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\n"
        f"aws_access_key_id = key\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = Store.open(f"s3://{bucket}/x")
    store.write("a", b"1")
    assert store.stat("a") is not None
    (tmp_path / "config").write_text("[profile mine\n")
    with pytest.raises(StorageError, match=r"config cannot be read .*correct it"):
        Store.open("s3://bucket/x")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"s3://key:{SECRET}@bucket/x", "s3://bucket/x is given with credentials in it"),
        (f"s3://{SECRET}@bucket/x", "s3://bucket/x is given with credentials in it"),
        ("s3://bucket/x?endpoint_override=localhost:1", "s3://bucket/x is not the URL of a folder"),
        (f"s3://bucket/x#token={SECRET}", "s3://bucket/x is not the URL of a folder"),
        ("s3:///x", "write s3://BUCKET/FOLDER"),
        ("s3://../x", "write s3://BUCKET/FOLDER"),
        ("s3://bucket/a/../b", "s3://bucket/a/../b has an empty, . or .. part, .*: write s3://bucket/b$"),
        ("s3://bucket/..", ": write s3://bucket$"),
        ("s3://bucket//a", ": write s3://bucket/a$"),
        ("s3://bucket/a//", ": write s3://bucket/a$"),
        ("gs://bucket/a//b/./c/", ": write gs://bucket/a/b/c$"),
        ("memory://a/../b", ": write memory://a/b$"),
        ("nobody://bucket/x", "use s3://, gs://, hf:// or a path"),
    ],
)
def test_a_url_that_is_not_taken(url, says):
    with pytest.raises(StorageError) as caught:
        Store.open(url)
    assert re.search(says, str(caught.value))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/a.b/..c/", "memory:///a", "memory://a/"])
def test_a_url_that_is_taken(s3, url):
    assert Store.open(url).location == url.rstrip("/")


def test_a_scheme_whose_package_is_missing_names_it():
    with pytest.raises(EnvironmentProblem, match=r"abfs://box/x needs a package .*adlfs"):
        Store.open("abfs://box/x")


def test_a_repository_of_the_hub_is_not_written_to():
    with pytest.raises(StorageError, match="each write is a commit: give hf://buckets/OWNER/NAME"):
        Store.open("hf://datasets/owner/name").write("x", b"")


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"size": 1, "mtime": 5.7}, 5),
        ({"size": 1, "LastModified": "1970-01-01T00:00:09+00:00"}, 9),
        ({"size": 1}, 0),
    ],
)
def test_times_of_other_clients(info, seconds):
    assert remote._from_info(info) == FileStat(1, seconds * 10**9)


def test_what_is_no_fault_of_the_store_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), client_errors("read", "s3://b/x", lambda: False):
        raise ZeroDivisionError
    with pytest.raises(AsvrError, match="ours"), client_errors("read", "s3://b/x", lambda: False):
        raise AsvrError("ours")
    with (
        pytest.raises(StorageError, match="cannot read s3://b/x: strange; check the store"),
        client_errors("read", "s3://b/x", lambda: False),
    ):
        raise pa.ArrowInvalid("strange")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("When x: AWS Error SLOW_DOWN during PutObject operation: Reduce (Request ID: ABC)", "does not keep up"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadBucket operation: No response body.", "set AWS_REGION"),
        ("AWS Error EXPIRED_TOKEN during ListObjectsV2 operation", "access is denied"),
        ("google::cloud::Status(PERMISSION_DENIED: Permission denied)", "access is denied"),
        ("google::cloud::Status(UNAVAILABLE: Could not create a OAuth2 access token)", "access is denied"),
        ("google::cloud::Status(UNAVAILABLE: Could not resolve host: storage.googleapis.com)", "cannot be reached"),
    ],
)
def test_what_stores_say(text, says):
    message = str(sentence("write", "s3://b/x", OSError(text)))
    assert says in message
    assert message.startswith("cannot write s3://b/x: ")
    assert "ABC" not in message


@pytest.mark.parametrize(
    "said",
    [
        "403 for https://b.s3.amazonaws.com/x?X-Amz-Credential={0}%2Fus&X-Amz-Date=1&X-Amz-Signature={0}: Forbidden",
        "<Url>https://storage.googleapis.com/b/x?X-Goog-Algorithm=A&X-Goog-Signature={0}</Url> Forbidden",
        "ClientError(url='https://account.blob/x?sv=1&sig={0}&se=2') Forbidden",
        "Max retries exceeded with url: /b/x?Expires=1&Signature={0}&KeyId=2 (Caused by Forbidden)",
        "https://cas/x?token={0}\nForbidden",
        "https://user:{0}@host/x: Forbidden",
        "Authorization: token={0}, Forbidden",
        "x" * 170 + " https://h/x?Expires=1&Signature={0} Forbidden",
        "AWS Error ACCESS_DENIED during GetObject operation: https://h/?a=1&b={0} Forbidden",
    ],
)
@pytest.mark.parametrize("secret", [SECRET, f"{SECRET}+%2F=="])
def test_what_a_client_says_of_a_signed_link_is_not_repeated(said, secret):
    message = str(sentence("read", "s3://b/x", OSError(said.format(secret))))
    assert message.startswith("cannot read s3://b/x: access is denied (")
    assert SECRET[:6] not in message
    assert "Forbidden" in message or said.startswith("xxx")


@pytest.mark.parametrize("length", [4, 4000])
def test_what_a_shorter_object_replaces_in_mid_read_is_read_as_that_object(s3, monkeypatch, length):
    """A client asks for the size and then for the bytes; a driver that slept in between found its lease given back.

    What the client says depends on whether the text of the store's error fits in the place of the bytes.
    """
    store = Store.open(s3)
    store.write("x", b"x" * length)
    once_opened(monkeypatch, store, lambda: store.write("x", b""))
    assert store.read("x") == b""


@pytest.mark.parametrize("length", [4, 400, 4000])
def test_what_is_deleted_in_mid_read_is_not_there(s3, s3_server, monkeypatch, length):
    """The object alone, or with its bucket."""
    store, bucket = Store.open(s3), s3.split("/")[2]
    store.write("x", b"x" * length)
    once_opened(monkeypatch, store, lambda: store.delete("x"))
    with pytest.raises(StorageError, match=f"cannot read {s3}/x: there is no such file"):
        store.read("x")

    store.write("x", b"x" * length)
    once_opened(monkeypatch, store, lambda: delete_bucket(s3_server.client(), bucket))
    with pytest.raises(StorageError, match=f"cannot read {s3}/x: the bucket does not exist .*; check its name"):
        store.read("x")


def delete_bucket(client, bucket):
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=entry["Key"])
    client.delete_bucket(Bucket=bucket)


def once_opened(monkeypatch, store, act):
    """Act between a reader's question for the size of an object and that for its bytes."""
    files = store._remote.files
    opened = type(files).open

    def open_and_act(self, key):
        monkeypatch.setattr(type(files), "open", opened)
        file = opened(self, key)
        file.size()
        act()
        return file

    monkeypatch.setattr(type(files), "open", open_and_act)
