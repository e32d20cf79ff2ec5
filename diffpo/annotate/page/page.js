/* Tasks, votes, keys and buttons. Texts of others are only ever set as text, never as HTML. */

import { ask, kept, newId, notice, onStored, put as post, send, unsent } from "./outbox.js";
import { clear, layout, loaded, mark, masks, place, put, unmark, view, zoom } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const AHEAD = 4; // tasks that are fetched before they are shown
const FLASH = 110; // ms that the chosen picture is framed
const UNDO = 50; // votes that can be undone
const still = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  name: "", about: { ask: "best" }, waiting: [], current: null, history: [], order: [], mine: 0,
  shown: 0, hidden: 0, hiddenAt: 0, asking: false, closing: false, turn: 0,
};

// ---- tasks

const label = (task) => task.task + (task.repeat ? ":1" : "");
const many = () => view.frames.length > 2;
const ranking = () => many() && state.about.ask === "ranking";

async function fetchMore() {
  if (state.asking || state.waiting.length >= AHEAD || !state.name) return;
  state.asking = true;
  const { name, turn } = state;
  const votes = unsent().filter((event) => event.kind === "vote" && event.annotator === name);
  const have = [...state.waiting, ...(state.current ? [state.current] : []), ...votes].map(label);
  const answer = await ask("next", { annotator: name, n: AHEAD + 1 - state.waiting.length, have });
  state.asking = false;
  if (name !== state.name) { fetchMore(); return; }
  if (!answer.ok) {
    notice(answer.error);
    setTimeout(fetchMore, 2000);
    return;
  }
  if (!unsent().length) notice("");
  progress(answer.body.progress);
  const there = new Set([...state.waiting, ...(state.current ? [state.current] : [])].map(label));
  const fresh = answer.body.tasks.filter((task) => !there.has(label(task)));
  state.waiting.push(...fresh);
  for (const key of fresh.flatMap((task) => [...task.sources, ...task.pictures])) new Image().src = "/picture/" + key;
  if (state.current || state.closing) return;
  if (state.waiting.length) showNext();
  else if (turn === state.turn) finish();
  else fetchMore(); // asked before the last vote
}

function showNext() {
  const task = state.waiting.shift();
  if (task) show(task); else { state.current = null; clear(); buttons(); }
  fetchMore();
}

function show(task, strokes) {
  $("card").hidden = true;
  Object.assign(state, { current: task, order: [], hidden: 0, shown: 0 });
  const focus = view.frames.findIndex((f) => f.box === document.activeElement);
  $("prompt").textContent = task.prompt;
  $("prompt").scrollTop = 0;
  sources(task.sources);
  put(task.pictures, strokes, { chosen: choose, loaded: ready, changed: buttons });
  $("question").textContent = document.title = question();
  if (focus >= 0) view.frames[Math.min(focus, view.frames.length - 1)].box.focus({ preventScroll: true });
}

/* What the pictures are edits of. */
function sources(keys) {
  $("sources").replaceChildren(...(keys ?? []).map((key) => {
    const image = new Image();
    image.src = "/picture/" + key;
    image.alt = "what the pictures are edits of";
    return image;
  }));
}

function question() {
  if (ranking()) return "Order them, the best first";
  return many() ? "Which is the best?" : "Which is better?";
}

function ready() {
  state.shown ||= performance.now();
  buttons();
}

// ---- votes

function choose(k) {
  if (!state.shown || k >= view.frames.length) return;
  if (!ranking()) {
    vote(view.frames.map((_, i) => (i === k ? 1 : 2)), false, many() ? `Picture ${k + 1}` : place(k), [k]);
    return;
  }
  const at = state.order.indexOf(k);
  state.order = at >= 0 ? state.order.slice(0, at) : [...state.order, k];
  const left = view.frames.map((f) => f.k).filter((i) => !state.order.includes(i));
  if (left.length === 1) state.order.push(left[0]);
  tags();
  if (state.order.length === view.frames.length) {
    vote(view.frames.map((_, i) => state.order.indexOf(i) + 1), false, "The order");
  }
}

function tags() {
  view.frames.forEach((f, i) => {
    const at = state.order.indexOf(i);
    f.box.classList.toggle("ranked", at >= 0);
    f.tag.textContent = at >= 0 ? ["1st", "2nd", "3rd"][at] ?? `${at + 1}th` : String(i + 1);
  });
}

function vote(ranks, bad, words, framed = []) {
  if (!state.current || state.closing || (ranks && !state.shown)) return;
  const { task, repeat } = state.current;
  const ms = state.shown ? Math.round(performance.now() - state.shown - state.hidden) : 0;
  const event = { kind: "vote", uid: newId(), annotator: state.name, task, repeat, ranks, bad, ms };
  const marks = ranks ? masks() : {};
  if (Object.keys(marks).length) event.marks = marks;
  try { post(event); } catch {
    notice("The storage of this browser is full. Free some space, and vote again.", 8000);
    return;
  }
  state.history.push({ uid: event.uid, task: state.current, strokes: view.frames.map((f) => f.strokes) });
  state.history = state.history.slice(-UNDO);
  remember();
  $("said").textContent = `${words}. Press U to undo.`;
  for (const k of framed) view.frames[k].box.classList.add("chosen");
  mark(false);
  state.turn++;
  state.closing = true;
  setTimeout(() => {
    state.closing = false;
    state.current = null;
    showNext();
  }, framed.length && !still.matches ? FLASH : 0);
}

function remember() {
  try {
    kept.set("history." + state.name, state.history.map(({ uid, task }) => ({ uid, task })));
  } catch { /* a vote can then be undone until the page is closed */ }
}

function undo() {
  if (state.closing || !state.history.length) return;
  const last = state.history.at(-1);
  try { post({ kind: "undo", uid: newId(), annotator: state.name, of: last.uid }); } catch {
    notice("The storage of this browser is full. Free some space, and undo again.", 8000);
    return;
  }
  state.history.pop();
  state.turn++;
  remember();
  if (state.current) state.waiting.unshift(state.current);
  mark(false);
  show(last.task, last.strokes);
  $("said").textContent = "The last vote is taken back.";
}

// ---- buttons

function choices() { // [action, text, key, class]
  const stacked = view.columns === 1;
  if (!view.frames.length) return [];
  if (!many()) {
    return [
      ["first", place(0), stacked ? "\u2191" : "\u2190", "side"], ["tie", "Tie", "T"], ["bad", "Both bad", "B"],
      ["second", place(1), stacked ? "\u2193" : "\u2192", "side"], ["skip", "Skip", "S"],
    ];
  }
  const over = ranking() ? [["restart", "Start over", "R"]] : [];
  return [["tie", "All equal", "T"], ["bad", "All bad", "B"], ...over, ["skip", "Skip", "S"]];
}

function buttons() {
  const list = choices(), row = $("votes"), signature = list.join("|");
  if (row.dataset.signature !== signature) {
    row.dataset.signature = signature;
    row.replaceChildren(...list.map(([action, text, key, kind]) => {
      const button = document.createElement("button"), hint = document.createElement("kbd");
      button.dataset.do = action;
      if (kind) button.className = kind;
      hint.textContent = key;
      button.append(text, hint);
      return button;
    }));
  }
  for (const button of row.children) button.disabled = !state.shown && button.dataset.do !== "skip";
  $("tools").hidden = row.hidden = view.marking;
  $("brush").hidden = !view.marking;
  const pressed = { zoom: Boolean(view.zoom), erase: view.erase };
  for (const button of document.querySelectorAll("#tools button, #brush button")) {
    const action = button.dataset.do;
    button.disabled = action === "undo" ? !state.history.length : !view.frames.length;
    if (action in pressed) button.setAttribute("aria-pressed", pressed[action]);
  }
  document.body.classList.toggle("zoomed", Boolean(view.zoom));
  document.body.classList.toggle("marking", view.marking);
}

function progress(now) {
  if (!now) return;
  const share = now.wanted ? Math.min(1, now.done / now.wanted) : 0;
  $("done").style.width = `${100 * share}%`;
  $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
  $("count").textContent = `${now.done} of ${now.wanted} votes`;
  $("bar").title = `${now.mine} votes by you`;
  state.mine = now.mine;
}

const all = (bad, words) => state.shown && vote(view.frames.map(() => 1), bad, words);
const actions = {
  first: () => choose(0),
  second: () => choose(1),
  tie: () => all(false, "A tie"),
  bad: () => all(true, "All are bad"),
  skip: () => vote(null, false, "Skipped"),
  restart: () => { state.order = []; tags(); },
  undo, zoom, mark: () => { mark(); layout(); },
  smaller: () => { view.brush = Math.max(0.006, view.brush / 1.4); },
  larger: () => { view.brush = Math.min(0.2, view.brush * 1.4); },
  erase: () => { view.erase = !view.erase; buttons(); },
  clear: unmark,
};
const KEYS = {
  arrowleft: "first", arrowup: "first", arrowright: "second", arrowdown: "second", t: "tie", b: "bad", s: "skip",
  u: "undo", z: "zoom", m: "mark", r: "restart", "[": "smaller", "]": "larger", e: "erase", c: "clear",
};
const only = { // when a key does something
  first: () => view.frames.length === 2, second: () => view.frames.length === 2, restart: ranking,
  ...Object.fromEntries(["smaller", "larger", "erase", "clear"].map((name) => [name, () => view.marking])),
};

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const key = event.key.toLowerCase(), action = KEYS[key];
  if (!$("card").hidden) {
    if (key === "u" && !$("end").hidden) undo();
  } else if (key === "escape") {
    if (view.marking) actions.mark(); else if (view.zoom) zoom();
  } else if (/^[1-9]$/.test(key)) {
    choose(Number(key) - 1);
  } else if (action && (only[action]?.() ?? true)) {
    event.preventDefault();
    actions[action]();
  }
});

addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!button || button.disabled) return;
  actions[button.dataset.do]();
  if (event.detail) button.blur(); // so that the space bar does not press it again
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) state.hiddenAt = performance.now();
  else if (state.hiddenAt) {
    if (state.shown) state.hidden += performance.now() - Math.max(state.hiddenAt, state.shown);
    state.hiddenAt = 0;
    send();
  }
});

// ---- beginning and end

function card(id) {
  state.current = null;
  clear();
  mark(false);
  buttons();
  $("prompt").textContent = "";
  sources([]);
  for (const each of ["begin", "end"]) $(each).hidden = each !== id;
  $("card").hidden = false;
}

function finish() {
  card("end");
  $("back").disabled = !state.history.length;
  const votes = state.mine === 1 ? "1 vote" : `${state.mine} votes`;
  $("thanks").textContent = state.mine ? `You gave ${votes}. Thank you.` : "There is nothing to vote on.";
  $("again").focus();
}

function begin(name) {
  Object.assign(state, { name, history: kept.get("history." + name, []), waiting: [] });
  try { kept.set("name", name); } catch { /* it is asked again the next time */ }
  $("name").textContent = name;
  $("card").hidden = true;
  fetchMore();
}

function welcome() {
  card("begin");
  $("who").value = state.name;
  $("who").focus();
}

$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("who").value.trim().replace(/\s+/g, " ");
  if (name) begin(name);
});
$("name").addEventListener("click", welcome);
$("again").addEventListener("click", () => { $("card").hidden = true; fetchMore(); });
$("back").addEventListener("click", undo);

onStored(progress);
const about = await ask("about");
if (about.ok) state.about = about.body;
send();
if (kept.get("name", "")) begin(kept.get("name", "")); else welcome();
