"""Takes the pictures of the console: the sample chats, by the real embedded Gemma.

    make screenshots

What was analysed within a minute is spread over a day, so that there is something to see.
"""

from __future__ import annotations

import random
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "console")]

from consoles import Visitor, served  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from test_browser import FLAGS, found_browser  # noqa: E402

from chatflow.cli import main  # noqa: E402
from chatflow.console.outbox import ReplyFile  # noqa: E402
from chatflow.console.people import People  # noqa: E402
from chatflow.database import tables  # noqa: E402
from chatflow.database.connections import Database  # noqa: E402
from chatflow.records import now  # noqa: E402

PICTURES = {
    "console-inbox": ("/", "light"),
    "console-draft": ("/drafts/{draft}", "light"),
    "console-dashboard": ("/dashboard", "dark"),
}


REASONS = ("bad_draft", "already_answered")
ENDS = ("", "", " A colleague will call you today.")


def spread(database: Database) -> None:
    """Moves what was made just now to all hours of the last day."""
    noise = random.Random(7)
    with database.write() as connection:
        for (chat_id,) in connection.execute(sa.select(tables.chats.c.chat_id)).all():
            moment = now() - timedelta(hours=20 * noise.random() ** 1.5, minutes=4)
            for table, column, after in (
                (tables.chats, "last_message_at", 0.0),
                (tables.analyses, "analysed_at", 2 + 3 * noise.random()),
                (tables.drafts, "waits_since", 0.0),
                (tables.drafts, "drafted_at", 6 + 3 * noise.random()),
            ):
                connection.execute(
                    sa.update(table)
                    .where(table.c.chat_id == chat_id)
                    .values({column: moment + timedelta(seconds=after)})
                )


def decide(database: Database, replies: ReplyFile) -> str:
    """Lets two people work; returns a draft that still waits."""
    drafts = tables.drafts
    with database.read() as connection:
        rows = connection.execute(sa.select(drafts).order_by(drafts.c.drafted_at)).mappings().all()
    with_text = [row for row in rows if row["text"]]
    for number, row in enumerate(with_text[:8]):
        person = People(("ada", "grace")[number % 2])
        with served(database, person, replies=replies, undo_seconds=0) as address:
            visitor, draft_id = Visitor(address), row["draft_id"]
            if number % 4 == 3:
                visitor.decide(draft_id, "dismiss", reason=REASONS[number % 8 > 3])
            else:
                visitor.decide(draft_id, "approve", text=row["text"] + ENDS[number % 4])
    return str(with_text[-1]["draft_id"])


def take() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/chatflow.db", connections=20)
        source = str(ROOT / "samples" / "chats.jsonl")
        assert main(["run", "--input", source, "--database", database.uri, "--summary=json"]) == 0
        spread(database)
        replies = ReplyFile(f"{folder}/replies.jsonl")
        draft = decide(database, replies)
        with (
            served(database, People("ada"), replies=replies) as address,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=found_browser(), args=list(FLAGS))
            for name, (path, scheme) in PICTURES.items():
                size = {"width": 1200, "height": 720}
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(address + path.format(draft=draft))
                page.screenshot(path=ROOT / "docs" / f"{name}.png")
                print(f"docs/{name}.png")


if __name__ == "__main__":
    take()
