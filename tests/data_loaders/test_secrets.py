"""What counts as a secret, in records and in messages; and what does not, so that a record can be used again."""

import pytest

from data_loaders import secrets
from data_loaders.prepare import compose
from data_loaders.secrets import REDACTED, is_secret_name, redact, redact_override, scrub

ADDRESSES = [
    "s3://AKIA:hunter2@bucket/p",
    "s3://AKIA:hunter2/with+slash@bucket/p",
    "s3://AKIA:hun@hunter2@bucket",
    "s3://AKIA%3Ahunter2@bucket/p",
    "https://hunter2@host/x",
    "postgresql://user:hunter2@host:5432/db",
    "simplecache::s3://K:hunter2@b/x",
    "abfs://c@acct.dfs.core.windows.net/p?sv=2024&sig=hunter2&se=1",
    "abfs://c/p?connection_string=AccountName=a;AccountKey=hunter2;EndpointSuffix=core",
    "smb://host/p?pwd=hunter2",
    "s3://b/p?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2&X-Amz-Security-Token=hunter2",
    "s3://b/p?AWSAccessKeyId=hunter2&Signature=hunter2&Expires=1",
    "gs://b/p?client_secret=hunter2",
    "s3://b?key=hunter2",
    "s3://b/p?region=eu-west-1&endpoint_override=http%3A//u:hunter2@h:9000",
    "AccountName=a;AccountKey=hunter2==;EndpointSuffix=core",
]
HARMLESS = [
    "/data/shop",
    "day=2026-11-0*",
    "token=abc/part-0.parquet",
    "hdfs://namenode:8020/user/a@b",
    "abfs://container@account.dfs.core.windows.net/p",
    "s3://bucket/p?region=eu-west-1&scheme=http&endpoint_override=http%3A//localhost:9000",
    "${oc.env:ROOT}?sig=${oc.env:SIGNATURE}",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_of_an_address_are_neither_recorded_nor_printed(address):
    for shown in (redact({"root": [address]})["root"][0], scrub(f"data.root={address}: no"), scrub(f"'{address}': no")):
        assert "hunter2" not in shown and REDACTED in shown
    assert secrets.holds_credentials(address)


@pytest.mark.parametrize("address", HARMLESS)
def test_what_holds_no_credentials_is_recorded_as_it_is(address):
    assert redact(address) == address and not secrets.holds_credentials(address)


def test_names_of_secrets_are_known_however_they_are_written():
    told = "api_key apiKey APIKEY AWSAccessKeyId x-amz-signature SAS Auth user_token DB_PWD secretAccessKey client_secret_2"
    for name in told.split():
        assert is_secret_name(name), name
    plain = "author tokenizer token_type key user_key bypass passenger signal label compass assignment"
    for name in plain.split():
        assert not is_secret_name(name), name


def test_a_tree_loses_its_secrets_and_nothing_else():
    options = {
        "Password": 123,
        "api-key": ["hunter2"],
        "auth": {"user": "me"},
        "token_dim": 3,
        "num_tokens": 5,
        "a": None,
    }
    found = redact({"optim": {"options": options}, "tables": {"token": {"rows": 4}}, "by_table": {"token": "row_wise"}})
    assert found["optim"]["options"] == {
        **{"Password": REDACTED, "api-key": [REDACTED], "auth": {"user": REDACTED}},
        **{"token_dim": 3, "num_tokens": 5, "a": None},
    }
    assert found["tables"] == {"token": {"rows": 4}} and found["by_table"] == {"token": "row_wise"}


def test_what_is_asked_of_the_environment_is_kept_as_the_question():
    asked = {"token": "${oc.env:TOKEN}", "password": "${data.password}", "secret": "${oc.env:NOT_SET,hunter2}"}
    assert redact(asked) == {**asked, "secret": REDACTED}


def test_overrides_and_messages():
    assert redact_override("+a.options={access_key: hunter2, lr: 1}") == f"+a.options={{access_key: {REDACTED}, lr: 1}}"
    assert redact_override("+a.token=hunter2") == f"+a.token={REDACTED}"
    assert redact_override("+a.token=${oc.env:X}") == "+a.token=${oc.env:X}"
    assert redact_override("model.hidden_units=[1,2]") == "model.hidden_units=[1,2]"
    assert scrub("token: expected float, found str") == "token: expected float, found str"


def test_a_value_of_the_environment_is_shown_as_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(secrets, "_provided", {})
    secrets.remember("MINE", "hunter2")
    secrets.remember("SHORT", "1")
    assert scrub("lr=hunter2: 1 is no number; hunter22") == "lr=${oc.env:MINE}: 1 is no number; hunter22"


def test_a_preparation_is_recorded_as_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "user")  # a word that occurs elsewhere, too
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nsources: {log: {files: ['${oc.env:MINE}/a.csv', '${name}.csv'], columns: {user: string, click: int64}}}\n"
        "examples: {start: log}\nschema: {label: click, tables: {user: {vocabulary: {}}}, "
        "features: {user: {kind: sparse, table: user}}}\n"
    )
    declaration = compose.load(str(path), ["sources.log.null_values=['s3://A:hunter2@b']"])
    recorded = compose.record(declaration)
    assert declaration.sources["log"].files == ["user/a.csv", "r.csv"]
    assert recorded["sources"]["log"]["files"] == ["${oc.env:MINE}/a.csv", "r.csv"]
    assert recorded["sources"]["log"]["null_values"] == [f"s3://{REDACTED}@b"]
    assert recorded["schema"]["features"]["user"]["table"] == "user"
    assert compose.check(recorded, "recorded").sources["log"].files == ["user/a.csv", "r.csv"]
