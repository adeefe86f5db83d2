"""Google's Sensitive Data Protection, by a stand-in on loopback that misbehaves when told to."""

import json
import re
from collections import deque

import pytest
from conftest import chat
from fakes import Loopback

from chatflow.errors import UsageError
from chatflow.options import RedactionSettings
from chatflow.redaction import dlp
from chatflow.redaction.redactor import Redactor

TEMPLATE = "projects/p/locations/europe-west1/inspectTemplates/t"


class FakeDlp(Loopback):
    """Finds words in capital letters with a number, such as BOX7, as `BOX_NUMBER`.

    Attributes:
      faults: statuses of the next answers.
      most: findings in one answer; it says so if there were more.
      asked: the calls: path and body.
    """

    def __init__(self):
        self.faults, self.most, self.asked = deque(), 3000, []

    def answer(self, method, path, body):
        self.asked.append((path, body))
        if self.faults and (status := self.faults.popleft()) != 200:
            return status, {"error": {"code": status}}
        findings = [
            {
                "infoType": {"name": "BOX_NUMBER"},
                "likelihood": "LIKELY",
                "location": {
                    "codepointRange": {"start": str(m.start()), "end": str(m.end())},
                    "contentLocations": [
                        {"recordLocation": {"tableLocation": {"rowIndex": str(row)} if row else {}}}
                    ],
                },
            }
            for row, cells in enumerate(body["item"]["table"]["rows"])
            for m in re.finditer(r"BOX\d+", cells["values"][0]["stringValue"])
        ]
        found = {"findings": findings[: self.most]}
        return 200, {"result": found | {"findingsTruncated": len(findings) > self.most}}


@pytest.fixture
def service(monkeypatch):
    dlp._session.cache_clear()
    with FakeDlp() as fake:
        monkeypatch.setenv(dlp.HOST_VARIABLE, f"127.0.0.1:{fake.port}")
        yield fake
    dlp._session.cache_clear()


def redacted(*texts, redact=f"dlp:{TEMPLATE}", project=""):
    said = Redactor.of(RedactionSettings(redact=redact), project).chat(chat(*texts))
    return [message.text for message in said.chat.messages]


def test_what_the_service_finds_is_redacted(service):
    found = redacted("my box is BOX7 🎉", "BOX12? BOX7!", "none")
    assert found == ["my box is [BOX_NUMBER_1] 🎉", "[BOX_NUMBER_2]? [BOX_NUMBER_1]!", "none"]
    ((path, body),) = service.asked
    assert path == "/v2/projects/p/locations/europe-west1/content:inspect"
    assert body["inspectTemplateName"] == TEMPLATE
    assert "infoTypes" not in body["inspectConfig"]


def test_info_types_and_own_kinds_together(service):
    (found,) = redacted("BOX7, ann@x.org", redact="email,dlp:BOX_NUMBER+OTHER", project="p")
    assert found == "[BOX_NUMBER_1], [EMAIL_1]"
    ((path, body),) = service.asked
    assert path == "/v2/projects/p/locations/global/content:inspect"
    assert body["inspectConfig"]["infoTypes"] == [{"name": "BOX_NUMBER"}, {"name": "OTHER"}]


def test_it_is_asked_again_where_that_may_help(service, monkeypatch):
    monkeypatch.setattr("chatflow.network.FIRST_PAUSE", 0.01)
    service.faults.extend([503, 429])
    assert redacted("BOX7") == ["[BOX_NUMBER_1]"]
    assert len(service.asked) == 3


def test_what_nobody_redacted_goes_nowhere(service):
    """The bundle fails, and the runner tries it again; a dead letter would have the words."""
    service.faults.append(403)
    with pytest.raises(dlp.requests.HTTPError, match="403"):
        redacted("BOX7")
    assert len(service.asked) == 1


def test_at_launch_the_service_is_asked_once(service):
    asks = Redactor.of(RedactionSettings(redact=f"dlp:{TEMPLATE}")).dlp
    asks.check()
    service.faults.append(403)
    with pytest.raises(UsageError, match=r"--redact=dlp:…: .* refuses: .*403"):
        asks.check()
    assert len(service.asked) == 2


def test_many_findings_are_asked_for_in_parts(service):
    service.most = 5
    assert "BOX" not in "".join(redacted(*["BOX1 " * 7] * 3)).replace("[BOX_NUMBER_1]", "")


def test_long_texts_are_sent_in_pieces(service):
    text = "x " * 100_000 + "BOX7 " + "y" * 150_000 + " BOX8"
    (found,) = redacted(text)
    assert found == text.replace("BOX7", "[BOX_NUMBER_1]").replace("BOX8", "[BOX_NUMBER_2]")
    assert all(len(json.dumps(body)) < 500_000 for _, body in service.asked)
