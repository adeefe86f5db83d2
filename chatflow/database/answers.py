"""Stores the answers of models by question, and the money that runs have spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from chatflow.database.connections import Database
from chatflow.database.tables import answers, spending
from chatflow.records import now


def kept_answers(database: Database, question_ids: Sequence[str]) -> dict[str, str]:
    """Returns the stored answers to some questions, by question id."""
    query = sa.select(answers.c.question_id, answers.c.answer)
    found: dict[str, str] = {}
    with database.read() as connection:
        for start in range(0, len(question_ids), 500):  # SQLite's limit is on parameters
            some = question_ids[start : start + 500]
            rows = connection.execute(query.where(answers.c.question_id.in_(some)))
            found.update((row.question_id, row.answer) for row in rows)
    return found


class Kept(NamedTuple):
    """A stored answer, as JSON, with the key of the model that answered."""

    question_id: str
    chat_id: str
    model: str
    answer: str


def keep_answer(database: Database, kept: Kept) -> None:
    """Stores an answer, unless the question already has one."""
    row = {**kept._asdict(), "answered_at": now()}
    with database.write() as connection:
        connection.execute(_insert(database, answers).values(row).on_conflict_do_nothing())


def spend(database: Database, run: str, usd: float) -> float:
    """Adds an amount to the spending of a run and returns the sum of all its workers."""
    insert = _insert(database, spending).values(run=run, usd=usd)
    add = insert.on_conflict_do_update(
        index_elements=["run"], set_={"usd": spending.c.usd + insert.excluded.usd}
    )
    with database.write() as connection:
        return float(connection.execute(add.returning(spending.c.usd)).scalar_one())


def _insert(database: Database, table: sa.Table) -> Any:
    return (sqlite.insert if database.is_sqlite else postgresql.insert)(table)
