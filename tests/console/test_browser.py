"""The console in a real browser, on SQLite and on a real PostgreSQL."""

import functools
import re
import shutil
import statistics
import threading
import time

import pytest
import sqlalchemy as sa
from axe_playwright_python.sync_playwright import Axe
from conftest import chat, required
from consoles import LOCAL, angry_chat, served, write
from playwright.sync_api import Error, expect, sync_playwright

from chatflow.console import decisions
from chatflow.console.outbox import ReplyFile
from chatflow.console.people import People, new_token, read_users
from chatflow.database import tables
from chatflow.options import Options
from chatflow.running.launch import execute

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def found_browser():
    """The browser's path; without one, it is what `playwright install chromium` fetched."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def chromium():
    """The browser. Its end ends Playwright's event loop: no other can run in this thread before."""
    with sync_playwright() as playwright:
        try:
            path = found_browser()
            browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        except Error as error:
            required("Chromium", f"apt-get install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture
def window(chromium):
    """Opens pages, each with separate cookies; what they complain of fails the test."""
    complaints, contexts = [], []

    def opened(address, **settings):
        context = chromium.new_context(**settings)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [said for said in complaints if not any(each in said for each in EXPECTED)] == []


# A session that has ended, a decision that came too late, a page that is not there, a proxy, and a
# console that has ended.
EXPECTED = ("401", "409", "404", "502", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING")


@pytest.fixture
def replies(tmp_path):
    path = tmp_path / "replies.jsonl"
    return ReplyFile(str(path))


def status(database, draft_id):
    with database.read() as connection:
        drafts = tables.drafts
        query = sa.select(drafts.c.status).where(drafts.c.draft_id == draft_id)
        return connection.execute(query).scalar_one()


def expect_listening(page):
    expect(page.locator("body[data-listens][data-decides]")).to_be_attached()


def expect_page(page, title):
    """The page of this title, which takes keys."""
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    expect_listening(page)


# What a page looks like, and which keys it takes, is the same whatever the database.
on_sqlite = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)


RULES = (
    {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
)


@pytest.mark.slow
def test_the_inbox_fills_while_a_pipeline_writes(database, new_database, window, lines, script):
    with served(database) as address:
        page = window(address)
        expect(page.get_by_text("All caught up.")).to_be_visible()
        expect_listening(page)
        chats = [chat("It is late!", chat_id=f"chat-{i}") for i in range(3)]
        options = Options(input=lines(*chats), model=script(*RULES), database=new_database)
        execute(options, [])
        for each in chats:
            row = page.locator(".draft", has_text=each.chat_id)
            expect(row).to_contain_text("We are sorry that it is late.")
        expect(page.locator("#waiting")).to_have_text("3")
        assert page.title().startswith("(3) Inbox")


@pytest.mark.slow
def test_approve_edit_dismiss_and_undo(database, window, replies):
    write(database, *angry_chat(1), *angry_chat(2), *angry_chat(3))
    with served(database, replies=replies, undo_seconds=1) as address:
        page = window(address)
        page.locator("#draft-d1r0").click()
        expect(page.locator("#messages")).to_contain_text("My food is late!")
        expect(page.get_by_text("Summary 1.")).to_be_visible()
        expect(page.get_by_text("gemma, prompts p1").first).to_be_visible()
        page.get_by_label("The reply's text").fill("We are truly sorry.")
        page.get_by_role("button", name="Approve").click()
        # On to the next one, with word of what was done.
        expect(page.get_by_role("heading", name="chat-2")).to_be_visible()
        expect(page.locator("#toast")).to_contain_text("Approved")
        page.get_by_label("Dismiss because").select_option("bad_draft")
        page.get_by_label("Comment").fill("It is about tea.")
        page.get_by_role("button", name="Dismiss").click()
        expect(page.get_by_role("heading", name="chat-3")).to_be_visible()
        expect(page.locator("#toast")).to_contain_text("Dismissed: chat-2")
        page.locator("#toast").get_by_role("button", name="Undo").click()
        expect(page.get_by_role("heading", name="chat-2")).to_be_visible()
        expect(page.locator("#history")).to_contain_text("ada undone")
        page.goto(f"{address}/drafts/d1r0")
        expect(page.get_by_text("approved by ada")).to_be_visible()
        page.goto(f"{address}/history")
        expect(page.locator("tbody tr").first).to_contain_text("undone")
        wait_for_reply(replies)
    assert "We are truly sorry." in replies.path.read_text()
    assert [status(database, f"d{i}r0") for i in (1, 2, 3)] == ["approved", "waiting", "waiting"]


def wait_for_reply(replies, seconds=15):
    happened = threading.Event()
    give_up = time.monotonic() + seconds
    while not replies.path.read_text():
        assert time.monotonic() < give_up, "no reply was sent"
        happened.wait(0.05)


@pytest.mark.slow
def test_an_approval_is_undone_before_it_is_sent(database, window, replies):
    write(database, *angry_chat(1))
    with served(database, replies=replies, undo_seconds=60) as address:
        page = window(f"{address}/drafts/d1r0")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator("#toast")).to_contain_text(re.compile(r"will be sent in \d+ s"))
        page.keyboard.press("u")
        expect(page.get_by_label("The reply's text")).to_have_value("We are sorry, customer-1.")
    assert status(database, "d1r0") == "waiting"
    assert replies.path.read_text() == ""


@pytest.mark.slow
def test_two_browsers_race_for_one_draft(database, window, replies):
    write(database, *angry_chat(1))
    with served(database, replies=replies, undo_seconds=0) as address:
        first, second = (window(f"{address}/drafts/d1r0") for _ in range(2))
        expect_listening(second)
        second.get_by_label("The reply's text").fill("Mine!")
        first.get_by_role("button", name="Approve").click()
        # The second one is told at once, and nothing that was typed is gone.
        expect(second.locator("#stale")).to_be_visible()
        expect(second.get_by_label("The reply's text")).to_have_value("Mine!")
        second.get_by_role("button", name="Approve").click()
        expect(second.locator("#problem")).to_contain_text("was approved by ada")
        expect(second.get_by_text("Mine!")).to_be_visible()
        wait_for_reply(replies)
    assert len(replies.path.read_text().splitlines()) == 1
    assert "Mine!" not in replies.path.read_text()


@pytest.mark.slow
def test_what_came_while_a_page_was_hidden_is_there_when_it_is_shown(sqlite, window):
    with served(sqlite) as address:
        page, other = window(address), window(address)
        expect_listening(page)
        expect_listening(other)
        show = """hidden => {
            Object.defineProperty(document, "hidden", {configurable: true, get: () => hidden});
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
        page.evaluate(show, True)
        write(sqlite, *angry_chat(1))
        expect(other.locator("#draft-d1r0")).to_be_visible()
        expect(page.locator("#draft-d1r0")).not_to_be_attached()
        page.evaluate(show, False)
        expect(page.locator("#draft-d1r0")).to_be_visible()


@pytest.mark.slow
def test_what_was_typed_is_not_left_without_a_question(sqlite, window):
    """Also where another form was sent meanwhile: that of the list of keys, or of an undo."""
    write(sqlite, *angry_chat(1), *angry_chat(2))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        asked = []
        page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
        page.get_by_role("button", name="Approve").click()
        expect_page(page, "chat-2")
        page.get_by_label("The reply's text").fill("Half a")
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        page.get_by_role("button", name="Close").click()
        page.evaluate("location.assign('/history')")
        page.wait_for_timeout(300)
        assert asked == ["beforeunload"]
        page.keyboard.press("u")
        page.wait_for_timeout(300)
        assert asked == ["beforeunload"] * 2
        expect(page.get_by_label("The reply's text")).to_have_value("Half a")
    assert status(sqlite, "d1r0") == "approved"


@pytest.mark.slow
def test_the_focus_stays_where_it_is_when_something_new_comes(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        page = window(address)
        expect_listening(page)
        for place in ("#tabs a:nth-child(2)", "#draft-d1r0"):
            page.locator(place).focus()
            write(sqlite, *angry_chat(2 + len(place)))
            expect(page.locator(f"#draft-d{2 + len(place)}r0")).to_be_visible()
            expect(page.locator(place)).to_be_focused()


EVIL = """<script>document.title='evil'</script><img src=x onerror="document.title='evil'">
"'><b>bold</b>{{ 7 * 7 }}{% raw %}<svg/onload=alert(1)></textarea><script>alert(2)</script>"""


@pytest.mark.slow
def test_a_chat_of_html_and_script_is_text(database, window):
    one, analysis, draft = angry_chat(1, text=EVIL)
    hostile = {"chat_id": "<i>7", "user_id": "<i>8"}
    write(
        database,
        one.model_copy(
            update={
                **hostile, "attributes": {"<b>name": EVIL},
                "messages": tuple(m.model_copy(update={"user_id": "<i>8"}) for m in one.messages),
            }
        ),
        analysis.model_copy(update={**hostile, "summary": EVIL, "model": "<b>m"}),
        draft.model_copy(update={**hostile, "text": EVIL}),
    )  # fmt: skip
    asked = []
    with served(database, People("<i>ada")) as address:
        page = window(address)
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        expect(page.locator(".summary")).to_have_text(EVIL)
        page.locator(".draft").click()
        expect(page.locator("#messages p").first).to_have_text(EVIL)
        assert page.get_by_label("The reply's text").input_value() == EVIL
        page.get_by_label("Dismiss because").select_option("other")
        page.get_by_label("Comment").fill(EVIL)
        page.get_by_role("button", name="Dismiss").click()
        expect(page.locator("#toast")).to_contain_text("<i>7")
        for path in ("/history", "/dashboard", "/?status=dismissed", f"/?q={EVIL[:40]}"):
            page.goto(address + path)
            assert "evil" not in page.title()
        assert page.locator("b:text('bold'), i:text('ada'), img[src=x]").count() == 0
        assert all(url.startswith(address) for url in asked)


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(database, window):
    write(database, *angry_chat(1), *angry_chat(2), *angry_chat(3), *angry_chat(4))
    with served(database) as address:
        page = window(address)
        expect_listening(page)
        page.keyboard.press("j")
        expect(page.locator("#draft-d1r0")).to_be_focused()
        page.keyboard.press("j")
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        expect_page(page, "chat-1")
        page.keyboard.press("e")
        expect(page.locator("#text")).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.type("jade sadly unsure: aaa")  # letters are letters there
        page.keyboard.press("Control+Enter")
        expect_page(page, "chat-2")
        page.keyboard.press("d")
        expect(page.locator("#reason")).to_be_focused()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect_page(page, "chat-3")
        page.keyboard.press("u")
        expect_page(page, "chat-2")
        page.keyboard.press("j")
        expect_page(page, "chat-3")
        page.keyboard.press("a")
        expect_page(page, "chat-2")  # the first of those that wait
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("i")
        expect_page(page, "Drafts")
        page.keyboard.press("/")
        expect(page.locator("#q")).to_be_focused()
        page.keyboard.type("chat-4")
        page.keyboard.press("Enter")
        expect(page.locator(".draft")).to_have_count(1)
        # And without the keys of chatflow's own: Tab and Enter.
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "draft-d4r0":
                break
        page.keyboard.press("Enter")
        expect_page(page, "chat-4")
    found = [status(database, f"d{i}r0") for i in (1, 2, 3, 4)]
    assert found == ["approved", "waiting", "approved", "waiting"]


@pytest.mark.slow
@on_sqlite
def test_single_keys_can_be_switched_off(database, window):
    write(database, *angry_chat(1))
    with served(database) as address:
        page = window(f"{address}/drafts/d1r0")
        expect_listening(page)
        page.get_by_role("button", name="Shortcuts").click()
        page.get_by_label("Use these shortcuts").uncheck()
        page.get_by_role("button", name="Close").click()
        page.keyboard.press("a")
        page.keyboard.press("i")
        expect(page.get_by_role("heading", name="chat-1")).to_be_visible()
    assert status(database, "d1r0") == "waiting"


SIZES = {"wide": (1280, 800), "narrow": (360, 740)}


@pytest.fixture
def populated(database):
    chat, analysis, draft = angry_chat(0)
    long = "x" * 300
    write(database, chat.model_copy(update={"attributes": {"name": long}}), analysis, draft)
    for number in range(1, 6):
        write(database, *angry_chat(number))
    write(database, *angry_chat(6, flag="ungrounded"))
    with database.write() as connection:
        connection.execute(
            sa.update(tables.drafts)
            .where(tables.drafts.c.draft_id == "d1r0")
            .values(edited_text=f"Sorry {long}")
        )
    return database


@pytest.mark.slow
@on_sqlite
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_everybody_can_use_it(populated, window, scheme, size):
    """axe finds nothing serious, and no page is wider than its window."""
    width, height = SIZES[size]
    with served(populated) as address:
        page = window(address, viewport={"width": width, "height": height}, color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (scheme == "dark")
        for path in ("/", "/drafts/d1r0", "/drafts/d6r0", "/history", "/dashboard", "/nothing"):
            page.goto(address + path)
            check(page, path)
            inner = page.evaluate("document.documentElement.scrollWidth")
            assert inner <= width, path
        page.goto(f"{address}/drafts/d2r0")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator("#toast")).to_be_visible()
        expect_listening(page)
        page.keyboard.press("?")
        check(page, "toast and help")


def check(page, path):
    found = Axe().run(page).response["violations"]
    serious = [
        (each["id"], node["html"])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert serious == [], path


@pytest.mark.slow
def test_ten_thousand_drafts(database, window):
    """The inbox answers in under 100 ms at the median (bench/console.py measures more)."""
    for start in range(0, 10_000, 500):
        write(database, *(r for number in range(start, start + 500) for r in angry_chat(number)))
    with served(database) as address:
        page = window(address)
        expect(page.locator("#waiting")).to_have_text("10,000")
        seconds = []
        for _ in range(15):
            page.reload()
            timing = "const [n] = performance.getEntriesByType('navigation'); "
            seconds.append(
                page.evaluate(f"() => {{ {timing} return n.responseEnd - n.startTime }}")
            )
        page.get_by_label("Search").fill("customer-9876")
        page.keyboard.press("Enter")
        expect(page.locator(".draft")).to_have_count(1)
    print(f"median {statistics.median(seconds):.0f} ms")


@pytest.fixture
def token(tmp_path):
    """The token of ada, who is the only one of `people_of`."""
    token, entry = new_token("ada", "agent")
    (tmp_path / "users.toml").write_text(entry)
    return token


def people_of(tmp_path):
    return People("", read_users(str(tmp_path / "users.toml")))


def sign_in(page, token):
    page.get_by_label("Your token").fill(token)
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_signing_in(sqlite, window, token, tmp_path):
    write(sqlite, *angry_chat(1))
    with served(sqlite, people_of(tmp_path)) as address:
        page = window(address)
        check(page, "sign-in")
        sign_in(page, token)
        expect(page.get_by_role("heading", name="Drafts")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


@pytest.fixture
def typing(sqlite, window, token, tmp_path):
    """Somebody who has typed a reply and a comment when their session ended, and pressed a button.

    Returns the page; there they can sign in again.
    """
    write(sqlite, *angry_chat(1))

    def typed(address, press="Approve"):
        page = window(f"{address}/drafts/d1r0?sort=newest")
        sign_in(page, token)
        expect_page(page, "chat-1")
        page.get_by_label("Comment").fill("Perhaps not.")
        page.get_by_label("The reply's text").fill("My words.")
        with sqlite.write() as connection:
            connection.execute(sa.delete(tables.sessions))
        page.get_by_role("button", name=press).click()
        expect(page.get_by_text("nothing was sent")).to_be_visible()
        assert status(sqlite, "d1r0") == "waiting"
        return page

    with served(sqlite, people_of(tmp_path)) as address:
        yield functools.partial(typed, address)


@pytest.mark.slow
def test_what_was_typed_outlives_a_session(typing, token):
    page = typing()
    kept = page.evaluate("JSON.stringify(sessionStorage)")
    assert "sent d1r0 by ada" in kept
    assert "words" not in kept
    sign_in(page, token)
    expect_page(page, "chat-1")
    expect(page.locator("#kept")).to_be_visible()
    expect(page.get_by_label("The reply's text")).to_have_value("My words.")
    expect(page.get_by_label("Comment")).to_have_value("Perhaps not.")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Saved.")).to_be_visible()
    expect(page.get_by_label("Comment")).to_have_value("Perhaps not.")
    expect(page.locator("#kept")).to_be_hidden()
    page.get_by_role("button", name="Approve").click()
    expect(page.locator("#toast")).to_contain_text("Approved")
    page.get_by_role("button", name="Undo").click()
    expect_page(page, "chat-1")
    expect(page.get_by_label("The reply's text")).to_have_value("My words.")
    expect(page.locator("#kept")).to_be_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["edited", "superseded"])
def test_what_was_typed_takes_no_place_of_what_came_meanwhile(typing, sqlite, token, change):
    page = typing("Save")
    if change == "edited":
        with sqlite.write() as connection:
            decisions.save(connection, "d1r0", 0, "Another's words.", "grace")
    else:
        write(sqlite, angry_chat(1, revision=1)[1])
    sign_in(page, token)
    expect_page(page, "chat-1")
    expect(page.locator("#kept")).to_be_hidden()
    expect(page.locator("#kept-aside")).to_contain_text("My words.")
    expect(page.locator("#kept-aside")).to_contain_text("Perhaps not.")
    if change == "edited":
        expect(page.get_by_label("The reply's text")).to_have_value("Another's words.")
    page.reload()
    expect_page(page, "chat-1")
    expect(page.locator("#kept-aside")).to_be_hidden()


def save(page, text):
    page.get_by_label("The reply's text").fill(text)
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Saved.")).to_be_visible()


@pytest.mark.slow
def test_what_was_typed_after_it_was_saved_is_not_taken_for_that(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        save(page, "First.")
        page.get_by_label("The reply's text").fill("Second.")
        page.route(re.compile("approve"), lambda route: route.fulfill(status=204))
        with page.expect_response(re.compile("approve")):
            page.get_by_role("button", name="Approve").click()
        page.reload()
        expect(page.get_by_label("The reply's text")).to_have_value("Second.")
        expect(page.locator("#kept")).to_be_visible()


@pytest.mark.slow
def test_after_a_refusal_what_was_typed_is_not_left_without_a_question(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        page.get_by_label("The reply's text").fill("My words.")
        write(sqlite, angry_chat(1, revision=1)[0])
        page.get_by_role("button", name="Approve").click()
        expect(page.locator("#problem")).to_contain_text("There are new messages")
        expect_listening(page)
        with page.expect_event("dialog") as asked:
            page.evaluate("setTimeout(() => location.assign('/history'))")
        assert asked.value.type == "beforeunload"
        asked.value.dismiss()
        expect(page.get_by_label("The reply's text")).to_have_value("My words.")


@pytest.mark.slow
def test_a_refusal_does_not_say_that_nothing_arrived(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        page.get_by_label("The reply's text").fill("My words.")
        write(sqlite, angry_chat(1, revision=1)[0])
        page.get_by_label("Dismiss because").select_option("other")
        page.get_by_role("button", name="Dismiss").click()
        expect(page.locator("#problem")).to_contain_text("There are new messages")
        expect(page.locator("#kept")).to_be_hidden()


@pytest.mark.slow
def test_a_text_that_was_emptied_is_the_models_again(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        save(page, "")
        expect(page.get_by_label("The reply's text")).to_have_value("We are sorry, customer-1.")
        expect(page.locator("#kept")).to_be_hidden()


@pytest.mark.slow
def test_a_key_that_is_pressed_twice_decides_once(sqlite, window):
    write(sqlite, *angry_chat(1), *angry_chat(2))
    with served(sqlite) as address:
        page = window(f"{address}/drafts/d1r0")
        expect_listening(page)
        page.keyboard.press("a")
        page.wait_for_url(re.compile("d2r0"))
        page.keyboard.press("a")
        expect_page(page, "chat-2")
    assert status(sqlite, "d2r0") == "waiting"


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["/changes", "/"])
def test_a_page_goes_on_after_an_error_of_the_server(sqlite, window, fails):
    failed = []

    def fail_once(route):
        failed.append(route.request.url)
        route.fulfill(status=502, body="no")

    with served(sqlite) as address:
        page = window(address)
        expect_listening(page)
        page.route(re.compile(f"^{address}{fails}(\\?|$)"), fail_once, times=1)
        if fails == "/changes":
            page.reload()
        write(sqlite, *angry_chat(1))
        expect(page.locator("#draft-d1r0")).to_be_visible()
    assert len(failed) == 1


@pytest.mark.slow
def test_an_open_page_says_that_its_session_has_ended(sqlite, window, token, tmp_path):
    with served(sqlite, people_of(tmp_path)) as address:
        page = window(address)
        sign_in(page, token)
        expect_page(page, "Drafts")
        with sqlite.write() as connection:
            connection.execute(sa.delete(tables.sessions))
        write(sqlite, *angry_chat(1))
        expect(page.locator("#signed-out")).to_be_visible()
        with page.expect_popup() as other:
            page.locator("#signed-out").get_by_role("link", name="Sign in").click()
        sign_in(other.value, token)
        expect(page.locator("#signed-out")).to_be_hidden(timeout=15_000)
        expect(page.locator("#draft-d1r0")).to_be_visible()


@pytest.mark.slow
def test_an_open_page_says_when_its_reply_was_sent(sqlite, window, replies):
    write(sqlite, *angry_chat(1))
    with served(sqlite, replies=replies, undo_seconds=3) as address:
        page = window(address)
        page.goto(f"{address}/drafts/d1r0")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator("#toast")).to_be_visible()  # so that no other page is under way
        page.goto(f"{address}/drafts/d1r0")
        expect(page.locator("#decision")).to_contain_text("not sent yet")
        expect(page.locator("#decision")).to_contain_text("; sent")
        expect(page.get_by_role("button", name="Undo")).not_to_be_attached()


@pytest.mark.slow
def test_without_replies_nothing_is_said_to_be_sent(sqlite, window):
    write(sqlite, *angry_chat(1))
    with served(sqlite, undo_seconds=0) as address:
        page = window(f"{address}/drafts/d1r0")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator("#toast")).to_contain_text("waits for a console that sends replies")
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_label("The reply's text")).to_be_visible()


@pytest.mark.slow
def test_attributes_with_odd_spaces_are_found(sqlite, window):
    odd = " New  York\n"
    chat_, *rest = angry_chat(1)
    write(sqlite, chat_.model_copy(update={"attributes": {"city": odd}}), *rest, *angry_chat(2))
    with served(sqlite) as address:
        page = window(address)
        page.get_by_label("Attribute").select_option(f"city={odd}")
        expect(page.locator(".draft")).to_have_count(1)
        expect(page.locator("#draft-d1r0")).to_be_visible()


@pytest.mark.slow
@on_sqlite
def test_without_scripts_it_works_too(database, window):
    write(database, *angry_chat(1))
    with served(database, LOCAL) as address:
        page = window(address, java_script_enabled=False)
        page.locator(".draft").click()
        page.get_by_role("button", name="Approve").click()
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_role("heading", name="chat-1")).to_be_visible()
    assert status(database, "d1r0") == "waiting"
