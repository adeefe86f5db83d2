// Keeps pages up to date, and adds keyboard shortcuts.
"use strict";

const main = document.getElementById("main");
const reply = document.getElementById("reply");
const text = document.getElementById("text");
const toast = document.getElementById("toast");
const signedOut = document.getElementById("signed-out");

// Shows times relative to now.

const units = [["day", 86400], ["hour", 3600], ["minute", 60]];
const ago = new Intl.RelativeTimeFormat("en", { numeric: "always", style: "short" });

// The server's clock, because this machine's may be wrong.
const skew = main.dataset.asked * 1000 - Date.now();
const opened = performance.now();

function showTimes() {
  for (const time of document.querySelectorAll("time")) {
    const moment = new Date(time.dateTime);
    if (isNaN(moment)) continue;
    const seconds = (moment - Date.now() - skew) / 1000;
    const [unit, size] = units.find(([, size]) => Math.abs(seconds) >= size) ?? ["", 1];
    time.textContent = unit ? ago.format(Math.round(seconds / size), unit) : "just now";
    time.title = moment.toLocaleString();
  }
}

// Shows how long an approval can be undone.

const until = toast?.querySelector("[data-seconds]");

function countDown() {
  if (!until) return;
  const seconds = Math.ceil(until.dataset.seconds - (performance.now() - opened) / 1000);
  until.textContent = seconds > 0 ? `in ${seconds} s` : "now";
  if (seconds <= 0) toast.querySelector("form")?.remove();
}

// Shows changes without a reload of the page.

const AGAIN = 3000; // milliseconds, after something failed
let asked = 0;
let waits;

// Returns a selector for an element, because a refresh may replace the focused one with a new copy.
function placeOf(element) {
  const href = element.getAttribute("href");
  if (element.id) return `#${CSS.escape(element.id)}`;
  return href ? `[data-live] [href="${CSS.escape(href)}"]` : "#main";
}

async function refresh() {
  waits = undefined;
  asked = Date.now();
  const answer = await fetch(main.dataset.address ?? location.href).catch(() => null);
  const body = await answer?.text().catch(() => null);
  const stale = document.getElementById("stale");
  if (answer?.status === 404 && stale) return show("stale");
  const away = answer?.redirected || answer?.status === 401;
  if (away) show("signed-out");
  if (away || !answer?.ok || body === null) {
    if (!document.hidden) waits ??= setTimeout(refresh, AGAIN);
    return;
  }
  signedOut.hidden = true;
  const page = new DOMParser().parseFromString(body, "text/html");
  const focused = document.activeElement;
  for (const part of document.querySelectorAll("[data-live]")) {
    const newer = page.getElementById(part.id);
    if (!newer || newer.isEqualNode(part.pristine)) continue;
    const before = new Set([...part.querySelectorAll("[id]")].map((each) => each.id));
    const pristine = newer.cloneNode(true);
    part.replaceWith(newer);
    newer.pristine = pristine;
    if (!before.size) continue;
    for (const each of newer.querySelectorAll(".draft")) {
      if (!before.has(each.id)) each.parentElement.classList.add("new");
    }
  }
  if (!focused.isConnected) document.querySelector(placeOf(focused))?.focus();
  const count = page.getElementById("waiting")?.textContent;
  if (count !== undefined && document.title !== page.title) {
    document.getElementById("said").textContent = `${count} drafts waiting`;
  }
  document.title = page.title;
  const now = page.getElementById("main").dataset;
  main.dataset.asked = now.asked;
  if (stale && ["version", "chat", "status"].some((name) => now[name] !== main.dataset[name])) {
    show("stale");
  }
  showTimes();
}

function refreshSoon() {
  const every = 1000 * (document.querySelector("[data-every]")?.dataset.every ?? 0.3);
  waits ??= setTimeout(refresh, Math.max(0, asked + every - Date.now()));
}

let changes;

function listen() {
  // A hidden page closes its connection, because browsers allow few connections to one server.
  if (document.hidden) {
    changes?.close();
    changes = undefined;
  } else if (!changes && document.querySelector("[data-live]")) {
    changes = new EventSource(`/changes?since=${main.dataset.asked}`);
    changes.addEventListener("change", refreshSoon);
    changes.addEventListener("open", () => document.body.toggleAttribute("data-listens", true));
    changes.addEventListener("error", () => {
      // Browsers reconnect after a broken connection, but not after an error response.
      if (changes?.readyState !== EventSource.CLOSED) return;
      changes = undefined;
      setTimeout(listen, AGAIN);
      waits ??= setTimeout(refresh, AGAIN);
    });
  }
}

// Keeps what a person typed if they leave the page by mistake or their session ends.

const fields = ["text", "reason", "comment"].map((id) => document.getElementById(id));
const keyOf = (draft) => `sent ${draft} by ${main.dataset.person}`;

// What is kept is encrypted with a key that only pages of this person have.
const bytes = Uint8Array.from(main.dataset.key.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const key = bytes.length && crypto.subtle?.importKey("raw", bytes, "AES-GCM", false, ["encrypt", "decrypt"]);

async function keep(draft, values) {
  if (!key) return;
  const iv = crypto.getRandomValues(new Uint8Array(12));
  const words = new TextEncoder().encode(JSON.stringify(values));
  const hidden = await crypto.subtle.encrypt({ name: "AES-GCM", iv }, await key, words);
  sessionStorage.setItem(keyOf(draft), JSON.stringify([iv, hidden].map((part) => [...new Uint8Array(part)])));
}

async function kept(draft) {
  const stored = JSON.parse(sessionStorage.getItem(keyOf(draft)));
  sessionStorage.removeItem(keyOf(draft));
  if (!stored || !key) return null;
  const [iv, hidden] = stored.map((part) => new Uint8Array(part));
  const words = await crypto.subtle.decrypt({ name: "AES-GCM", iv }, await key, hidden).catch(() => null);
  return words && JSON.parse(new TextDecoder().decode(words));
}

function show(id, words = "") {
  const part = document.getElementById(id);
  part.hidden = false;
  if (words) part.querySelector(".typed").textContent = words;
}

// The text that the page was loaded with; after a refused form, it is what the person typed.
const problem = document.getElementById("problem");
const typed = problem ? null : text?.value;

async function restore() {
  if (toast) sessionStorage.removeItem(keyOf(toast.dataset.draft)); // the form has arrived
  const { draft, version } = main.dataset;
  const sent = draft && (await kept(draft));
  if (!sent) return;
  if (problem) return; // the form has arrived, and its text is on the page
  const saved = sent.version !== version && document.getElementById("saved");
  if (text && (saved || sent.version === version)) {
    for (const field of fields) {
      const value = sent[field.id];
      if (value === null || field.value.trim() === value.trim() || (saved && field === text)) continue;
      field.value = value;
      if (!saved) show("kept");
    }
    return;
  }
  // The draft has changed since the form was sent.
  const missing = (words) => words?.trim() && !main.textContent.includes(words.trim());
  const words = [sent.text, sent.comment].filter(missing).join("\n\n");
  if (words) show("kept-aside", words);
}

document.getElementById("sign-out")?.addEventListener("submit", () => sessionStorage.clear());

let submitting = false;
let keeping = false;
let isKept = false;
document.addEventListener("input", () => (submitting = false));
document.addEventListener("submit", async (event) => {
  const { target, submitter } = event;
  if (target !== reply && target.id !== "dismiss") return (submitting = false);
  if (isKept) return (isKept = false); // it is sent now
  event.preventDefault();
  if (keeping) return;
  keeping = true;
  const { draft, version } = main.dataset;
  const values = Object.fromEntries(fields.map((field) => [field.id, field.value]));
  if (values.text === typed) values.text = null; // the model's words, or somebody else's
  await keep(draft, { version, ...values }).catch(() => null); // without a copy, it is sent too
  setTimeout(() => { // not in this event, in which browsers do not send the form again
    submitting = isKept = true;
    keeping = false;
    target.requestSubmit(submitter);
  });
});
addEventListener("beforeunload", (event) => {
  if (text && text.value !== typed && !submitting) event.preventDefault();
});

for (const select of document.querySelectorAll("#filters select")) {
  select.addEventListener("change", () => select.form.requestSubmit());
}

// Keyboard shortcuts.

const help = document.getElementById("help");
const singleKeys = document.getElementById("single-keys");
const keys = document.getElementById("keys");
if (keys) {
  keys.hidden = false;
  keys.addEventListener("click", () => help.showModal());
}
singleKeys.checked = localStorage.getItem("single-keys") !== "off";
singleKeys.addEventListener("change", () =>
  localStorage.setItem("single-keys", singleKeys.checked ? "on" : "off"));

// Waits, so that a key pressed twice does not approve the next draft, which nobody has seen.
let decides = false;
setTimeout(() => (decides = document.body.toggleAttribute("data-decides", true)), 400);

function approve() {
  reply?.requestSubmit(document.getElementById("approve"));
}

function follow(selector) {
  document.querySelector(selector)?.click();
}

function move(step) {
  const rows = [...document.querySelectorAll(".draft")];
  if (!rows.length) return follow(step > 0 ? "a[rel=next]" : "a[rel=prev]");
  const at = rows.indexOf(document.activeElement);
  rows[Math.min(Math.max(at < 0 ? 0 : at + step, 0), rows.length - 1)].focus();
}

const does = {
  j: () => move(1),
  k: () => move(-1),
  e: () => text?.focus(),
  a: () => decides && approve(),
  s: () => reply?.requestSubmit(document.getElementById("save")),
  d: () => document.getElementById("reason")?.focus(),
  u: () => document.querySelector("[data-undo]")?.requestSubmit(),
  i: () => (document.querySelector("a[rel=up]") ?? document.querySelector(".name")).click(),
  "/": () => document.getElementById("q")?.focus(),
  "?": () => help.showModal(),
};

document.addEventListener("keydown", (event) => {
  const writes = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && writes) return event.target.blur();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === text) {
    event.preventDefault();
    return approve();
  }
  if (event.key === "Enter" && event.target.id === "reason" && event.target.value) {
    event.preventDefault();
    return event.target.form.requestSubmit();
  }
  if (writes || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.repeat && !"jk".includes(event.key)) return;
  if (!singleKeys.checked && event.key !== "?") return;
  if (Object.hasOwn(does, event.key)) {
    event.preventDefault();
    does[event.key]();
  }
});

restore();
for (const part of document.querySelectorAll("[data-live]")) part.pristine = part.cloneNode(true);
showTimes();
countDown();
setInterval(showTimes, 30000);
setInterval(countDown, 500);
document.addEventListener("visibilitychange", () => {
  listen();
  if (!document.hidden && !signedOut.hidden) refreshSoon();
});
listen();
