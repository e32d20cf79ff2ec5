"use strict";
/* The page of `diffpo annotate`. Votes go into an outbox in localStorage first and leave it when the server has stored
   them, so neither a killed server, a full disk nor a closed tab loses one. Texts of others are only ever set as text. */

const $ = (id) => document.getElementById(id);
const stage = $("stage");
const AHEAD = 4; // tasks that are fetched before they are shown
const FLASH = 110; // ms that the chosen picture is framed
const still = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  name: "", about: { show: "pairs", ask: "best" }, waiting: [], current: null, history: [], frames: [], order: [],
  shown: 0, hidden: 0, hiddenAt: 0, busy: false, zoom: null, marking: false, erase: false, brush: 0.035, over: false,
};

// ---- what stays in this browser

const kept = {
  get(key, other) {
    try { return JSON.parse(localStorage.getItem("diffpo." + key)) ?? other; } catch { return other; }
  },
  set(key, value) { localStorage.setItem("diffpo." + key, JSON.stringify(value)); },
  remove(key) { localStorage.removeItem("diffpo." + key); },
  keys(start) {
    return Object.keys(localStorage).filter((key) => key.startsWith("diffpo." + start)).map((key) => key.slice(7)).sort();
  },
};

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is missing where the page is not on localhost
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

// ---- the outbox

let sending = false, retry = 1000, timer = 0;

function put(event) {
  const key = `out.${String(Date.now()).padStart(14, "0")}.${event.uid}`;
  kept.set(key, event); // throws if the browser's storage is full
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  try {
    for (let key; (key = kept.keys("out.")[0]); ) {
      const event = kept.get(key, null);
      if (!event) { kept.remove(key); continue; }
      const answer = await ask("event", event);
      if (answer.ok) {
        kept.remove(key);
        retry = 1000;
        progress(answer.body.progress);
      } else if (answer.status >= 400 && answer.status < 500 && ![401, 403, 408, 413, 429].includes(answer.status)) {
        kept.set(key.replace("out.", "refused."), event);
        kept.remove(key);
        notice(`A vote was refused and is kept in this browser: ${answer.error}`, 8000);
      } else {
        const n = kept.keys("out.").length;
        notice(`${answer.error} ${n === 1 ? "1 vote waits" : `${n} votes wait`} in this browser and will be sent again.`);
        timer = setTimeout(send, retry);
        retry = Math.min(15000, retry * 2);
        return;
      }
    }
    notice("");
  } finally { sending = false; }
}

async function ask(what, body) {
  let reply;
  try {
    reply = await fetch("/api/" + what, body === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const text = await reply.text();
    if (reply.ok) return { ok: true, status: reply.status, body: JSON.parse(text) };
    let error = text;
    try { error = JSON.parse(text).error; } catch { /* a plain sentence */ }
    return { ok: false, status: reply.status, error: sentence(error) };
  } catch {
    return { ok: false, status: 0, error: "The server does not answer." };
  }
}

function sentence(text) {
  const words = String(text).slice(0, 300) || "The server cannot answer.";
  return words[0].toUpperCase() + words.slice(1) + (words.endsWith(".") ? "" : ".");
}

let hush = 0;
function notice(text, ms = 0) {
  if (!text && hush) return; // one with a time of its own stays
  clearTimeout(hush);
  hush = ms ? setTimeout(() => { hush = 0; notice(""); }, ms) : 0;
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- tasks

const label = (task) => task.task + (task.repeat ? ":1" : "");

async function fetchMore() {
  if (state.busy || state.waiting.length >= AHEAD) return;
  state.busy = true;
  const name = state.name;
  const unsent = kept.keys("out.").map((key) => kept.get(key, {})).filter((e) => e.kind === "vote" && e.annotator === name);
  const have = [...state.waiting, ...(state.current ? [state.current] : []), ...unsent].map(label);
  const answer = await ask("next", { annotator: name, n: AHEAD - state.waiting.length + 1, have });
  state.busy = false;
  if (name !== state.name) return fetchMore();
  if (!answer.ok) {
    notice(answer.error);
    setTimeout(fetchMore, 2000);
    return;
  }
  if (!kept.keys("out.").length) notice("");
  progress(answer.body.progress);
  const there = new Set(have);
  for (const task of answer.body.tasks) {
    if (there.has(label(task))) continue;
    state.waiting.push(task);
    for (const key of task.pictures) new Image().src = "/picture/" + key;
  }
  state.over = !answer.body.tasks.length;
  if (!state.current) showNext();
}

function showNext() {
  const task = state.waiting.shift();
  if (task) show(task); else if (state.over) finish(); else { state.current = null; clearStage(); }
  fetchMore();
}

function show(task, strokes) {
  $("card").hidden = true;
  state.current = task;
  state.order = [];
  state.hidden = 0;
  state.shown = 0;
  $("prompt").textContent = task.prompt;
  $("prompt").scrollTop = 0;
  document.title = question();
  $("question").textContent = question() + (task.repeat ? " (once more)" : "");
  $("question").textContent = question();
  clearStage();
  task.pictures.forEach((key, k) => stage.append(frame(key, k, task.pictures.length, strokes?.[k] ?? [])));
  layout();
  buttons();
  if (document.activeElement && document.activeElement !== document.body) document.activeElement.blur();
}

function question() {
  if (state.about.ask === "ranking" && isSet()) return "Order them, the best first";
  return isSet() ? "Which is the best?" : "Which is better?";
}

const isSet = () => state.current && state.current.pictures.length > 2;
const ranking = () => isSet() && state.about.ask === "ranking";

function clearStage() {
  stage.replaceChildren();
  state.frames = [];
}

function frame(key, k, total, strokes) {
  const box = document.createElement("button"), layer = document.createElement("div");
  const image = document.createElement("img"), canvas = document.createElement("canvas"), tag = document.createElement("span");
  box.className = "frame";
  box.type = "button";
  layer.className = "layer";
  image.alt = "";
  image.draggable = false;
  tag.className = total === 2 ? "tag arrow" : "tag";
  tag.textContent = total === 2 ? (k ? "\u2192" : "\u2190") : String(k + 1);
  tag.setAttribute("aria-hidden", "true");
  layer.append(image, canvas);
  box.append(layer, tag);
  const own = { box, layer, image, canvas, tag, strokes, k };
  box.addEventListener("click", (event) => { if (!state.marking && !state.zoom) choose(k); else if (event.detail === 0) choose(k); });
  image.addEventListener("load", () => { box.classList.add("ready"); layout(); ready(); });
  image.addEventListener("error", () => {
    box.classList.add("failed");
    box.dataset.why = "This picture cannot be shown. Skip it with S.";
  });
  pointers(own);
  state.frames.push(own);
  image.src = "/picture/" + key;
  return box;
}

function ready() {
  if (state.frames.length && state.frames.every((f) => f.box.classList.contains("ready")) && !state.shown) {
    state.shown = performance.now();
    buttons();
  }
}

// ---- how large the pictures are

function layout() {
  const n = state.frames.length;
  if (!n) return;
  const style = getComputedStyle(stage), gap = parseFloat(style.columnGap);
  const width = stage.clientWidth - parseFloat(style.paddingLeft) * 2, height = stage.clientHeight - 2;
  const ratios = state.frames.map((f) => (f.image.naturalWidth || 1) / (f.image.naturalHeight || 1));
  const ratio = ratios.reduce((a, b) => a + b, 0) / n;
  let best = { area: 0, columns: 1, rows: 1 };
  for (let columns = 1; columns <= n; columns++) {
    const rows = Math.ceil(n / columns);
    const w = (width - gap * (columns - 1)) / columns, h = (height - gap * (rows - 1)) / rows;
    const area = Math.min(w, h * ratio) ** 2 / ratio;
    if (area > best.area * 1.02) best = { area, columns, rows, w, h };
  }
  state.columns = best.columns;
  stage.style.gridTemplateColumns = `repeat(${best.columns}, auto)`;
  state.frames.forEach((f, k) => {
    const w = Math.max(1, Math.min(best.w, best.h * ratios[k]));
    f.box.style.width = `${Math.floor(w)}px`;
    f.box.style.height = `${Math.floor(w / ratios[k])}px`;
    if (n === 2) f.tag.textContent = best.columns === 1 ? "\u2191\u2193"[k] : "\u2190\u2192"[k];
    if (n === 2) f.box.setAttribute("aria-label", `${place(k)} picture is better`);
    else f.box.setAttribute("aria-label", `Picture ${k + 1}`);
    paint(f);
  });
  look();
  buttons();
}

function place(k) {
  return state.columns === 1 ? ["Upper", "Lower"][k] : ["Left", "Right"][k];
}

// ---- buttons

function buttons() {
  const n = state.frames.length, can = Boolean(state.shown);
  const list = [];
  if (n === 2) {
    list.push(["first", `${place(0)}`, state.columns === 1 ? "\u2191" : "\u2190", "side"]);
    list.push(["tie", "Tie", "T"], ["bad", "Both bad", "B"]);
    list.push(["second", `${place(1)}`, state.columns === 1 ? "\u2193" : "\u2192", "side"]);
  } else if (n) {
    list.push(["tie", "All equal", "T"], ["bad", "All bad", "B"]);
    if (ranking()) list.push(["restart", "Start over", "R"]);
  }
  if (n) list.push(["skip", "Skip", "S"]);
  const row = $("votes");
  const signature = list.map((each) => each.join()).join("|");
  if (row.dataset.signature !== signature) {
    row.dataset.signature = signature;
    row.replaceChildren(...list.map(([action, text, key, kind]) => {
      const button = document.createElement("button"), hint = document.createElement("kbd");
      button.dataset.do = action;
      if (kind) button.className = kind;
      hint.textContent = key;
      button.append(text + " ", hint);
      return button;
    }));
  }
  for (const button of row.children) button.disabled = !can && button.dataset.do !== "skip";
  $("tools").hidden = state.marking;
  $("brush").hidden = !state.marking;
  row.hidden = state.marking;
  for (const button of document.querySelectorAll("[data-do=undo]")) button.disabled = !state.history.length;
  for (const button of document.querySelectorAll("[data-do=zoom]")) button.setAttribute("aria-pressed", Boolean(state.zoom));
  for (const button of document.querySelectorAll("[data-do=erase]")) button.setAttribute("aria-pressed", state.erase);
  document.body.classList.toggle("zoomed", Boolean(state.zoom));
  document.body.classList.toggle("marking", state.marking);
}

function progress(now) {
  if (!now) return;
  const share = now.wanted ? now.done / now.wanted : 0;
  $("done").style.width = `${100 * Math.min(1, share)}%`;
  $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
  $("count").textContent = `${now.done} of ${now.wanted} votes`;
  $("count").title = `${now.mine} of them by you`;
  state.mine = now.mine;
}

// ---- votes

function choose(k) {
  if (!state.shown) return;
  const n = state.frames.length;
  if (k >= n) return;
  if (!ranking()) return vote(state.frames.map((_, i) => (i === k ? 1 : 2)), false, [k], n === 2 ? place(k) : `Picture ${k + 1}`);
  if (state.order.includes(k)) state.order = state.order.slice(0, state.order.indexOf(k));
  else state.order.push(k);
  if (state.order.length === n - 1) state.order.push([...state.frames.keys()].find((i) => !state.order.includes(i)));
  tags();
  if (state.order.length === n) {
    const ranks = state.frames.map((_, i) => state.order.indexOf(i) + 1);
    vote(ranks, false, [], "The order");
  }
}

function tags() {
  state.frames.forEach((f, i) => {
    const at = state.order.indexOf(i);
    f.box.classList.toggle("ranked", at >= 0);
    f.tag.textContent = at >= 0 ? ["1st", "2nd", "3rd"][at] ?? `${at + 1}th` : String(i + 1);
  });
}

let closing = false;
function vote(ranks, bad, chosen, words) {
  const task = state.current;
  if (!task || closing || (!state.shown && ranks)) return;
  const event = {
    kind: "vote", uid: newId(), annotator: state.name, task: task.task, repeat: task.repeat, ranks, bad,
    ms: state.shown ? Math.round(performance.now() - state.shown - state.hidden) : 0,
  };
  const marks = drawn();
  if (Object.keys(marks).length) event.marks = marks;
  try { put(event); } catch {
    notice("The storage of this browser is full: free some space, and vote again.", 8000);
    return;
  }
  const strokes = state.frames.map((f) => f.strokes);
  state.history.push({ uid: event.uid, task, strokes });
  state.history = state.history.slice(-50);
  remember();
  $("said").textContent = `${words}. U undoes it.`;
  for (const k of chosen) state.frames[k].box.classList.add("chosen");
  if (state.marking) mark();
  state.zoom = null;
  closing = true;
  setTimeout(() => { closing = false; state.current = null; showNext(); }, chosen.length && !still.matches ? FLASH : 0);
}

function remember() {
  try {
    kept.set("history." + state.name, state.history.map(({ uid, task }) => ({ uid, task })));
  } catch { /* undo is then only possible until the page is closed */ }
}

function undo() {
  const last = state.history.pop();
  if (!last || closing) return;
  remember();
  put({ kind: "undo", uid: newId(), annotator: state.name, of: last.uid });
  if (state.current) state.waiting.unshift(state.current);
  state.zoom = null;
  $("said").textContent = "The last vote is taken back.";
  show(last.task, last.strokes);
}

// ---- zoom and marks

function look() {
  for (const f of state.frames) {
    const z = state.zoom;
    if (!z) { f.layer.style.transform = ""; continue; }
    const w = f.box.clientWidth, h = f.box.clientHeight;
    f.layer.style.transform = `translate(${-z.x * w * (z.scale - 1)}px, ${-z.y * h * (z.scale - 1)}px) scale(${z.scale})`;
  }
}

function zoom() {
  const f = state.frames[0];
  if (!f) return;
  const exact = f.image.naturalWidth / Math.max(1, f.box.clientWidth);
  state.zoom = state.zoom ? null : { x: 0.5, y: 0.5, scale: Math.max(2.5, exact) };
  look();
  buttons();
}

function scaleBy(factor) {
  state.zoom ??= { x: 0.5, y: 0.5, scale: 1 };
  state.zoom.scale = Math.min(16, state.zoom.scale * factor);
  if (state.zoom.scale <= 1.02) state.zoom = null;
  look();
  buttons();
}

function mark() {
  if (!state.frames.length) return;
  state.marking = !state.marking;
  state.erase = false;
  for (const f of state.frames) paint(f);
  buttons();
  layout();
}

const limit = (value) => Math.min(1, Math.max(0, value));

function spot(f, event) { // in the picture, 0 to 1
  const box = f.layer.getBoundingClientRect();
  return [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height];
}

function pointers(f) {
  const down = new Map();
  let stroke = null, apart = 0;
  f.box.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    down.set(event.pointerId, event);
    if (down.size === 2 && stroke) { f.strokes.pop(); stroke = null; paint(f); }
    if (state.marking && down.size === 1) {
      event.preventDefault();
      f.box.setPointerCapture(event.pointerId);
      stroke = { size: state.brush / (state.zoom?.scale ?? 1), erase: state.erase, points: [spot(f, event)] };
      f.strokes.push(stroke);
      paint(f, event);
    }
    if (down.size === 2) apart = distance(down);
  });
  f.box.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (down.has(event.pointerId)) down.set(event.pointerId, event);
    if (down.size === 2) {
      const now = distance(down);
      scaleBy(now / apart);
      apart = now;
    } else if (stroke) {
      for (const each of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(spot(f, each));
      paint(f, event);
    } else if (state.marking) paint(f, event);
    else if (state.zoom && event.pointerType === "mouse") {
      const box = f.box.getBoundingClientRect();
      state.zoom.x = limit((event.clientX - box.x) / box.width);
      state.zoom.y = limit((event.clientY - box.y) / box.height);
      look();
    } else if (state.zoom && before) {
      const reach = state.zoom.scale - 1;
      state.zoom.x = limit(state.zoom.x - (event.clientX - before.clientX) / f.box.clientWidth / reach);
      state.zoom.y = limit(state.zoom.y - (event.clientY - before.clientY) / f.box.clientHeight / reach);
      look();
    }
  });
  const up = (event) => {
    down.delete(event.pointerId);
    stroke = null;
    if (state.marking) paint(f);
  };
  for (const kind of ["pointerup", "pointercancel"]) f.box.addEventListener(kind, up);
  f.box.addEventListener("pointerleave", () => paint(f));
  f.box.addEventListener("wheel", (event) => { event.preventDefault(); scaleBy(Math.exp(-event.deltaY / 400)); }, { passive: false });
}

function distance(down) {
  const [a, b] = [...down.values()];
  return Math.max(1, Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY));
}

function paint(f, cursor) { // the marks as they are seen
  const ratio = Math.min(2, devicePixelRatio || 1);
  const w = Math.round(f.box.clientWidth * ratio), h = Math.round(f.box.clientHeight * ratio);
  if (f.canvas.width !== w || f.canvas.height !== h) { f.canvas.width = w; f.canvas.height = h; }
  const c = f.canvas.getContext("2d");
  c.clearRect(0, 0, w, h);
  strokes(c, f.strokes, w, h, "rgb(255, 64, 129)");
  c.globalCompositeOperation = "source-in";
  c.fillStyle = "rgba(255, 64, 129, .55)";
  c.fillRect(0, 0, w, h);
  c.globalCompositeOperation = "source-over";
  if (cursor && state.marking) {
    const [x, y] = spot(f, cursor), r = (state.brush / (state.zoom?.scale ?? 1)) * w;
    c.lineWidth = ratio;
    for (const [colour, grow] of [["#000", 1], ["#fff", 0]]) {
      c.strokeStyle = colour;
      c.beginPath();
      c.arc(x * w, y * h, r + grow * ratio, 0, 7);
      c.stroke();
    }
  }
}

function strokes(c, all, w, h, colour) {
  c.lineCap = c.lineJoin = "round";
  for (const { size, erase, points } of all) {
    c.globalCompositeOperation = erase ? "destination-out" : "source-over";
    c.strokeStyle = colour;
    c.lineWidth = 2 * size * w;
    c.beginPath();
    c.moveTo(points[0][0] * w, points[0][1] * h);
    for (const [x, y] of points.length > 1 ? points : [points[0]]) c.lineTo(x * w, y * h);
    c.stroke();
  }
  c.globalCompositeOperation = "source-over";
}

function drawn() { // {number as shown: PNG in base64} of the pictures with marks, in their own size
  const found = {};
  for (const f of state.frames) {
    if (!f.strokes.some((each) => !each.erase)) continue;
    const canvas = document.createElement("canvas");
    canvas.width = f.image.naturalWidth;
    canvas.height = f.image.naturalHeight;
    const c = canvas.getContext("2d");
    strokes(c, f.strokes, canvas.width, canvas.height, "#fff");
    c.globalCompositeOperation = "destination-over";
    c.fillStyle = "#000";
    c.fillRect(0, 0, canvas.width, canvas.height);
    found[f.k] = canvas.toDataURL("image/png").split(",")[1];
  }
  return found;
}

// ---- keys, buttons, cards

const actions = {
  first: () => choose(0),
  second: () => choose(1),
  tie: () => state.shown && vote(state.frames.map(() => 1), false, [], "A tie"),
  bad: () => state.shown && vote(state.frames.map(() => 1), true, [], "All are bad"),
  skip: () => vote(null, false, [], "Skipped"),
  restart: () => { state.order = []; tags(); },
  undo, zoom, mark,
  smaller: () => { state.brush = Math.max(0.006, state.brush / 1.4); },
  larger: () => { state.brush = Math.min(0.2, state.brush * 1.4); },
  erase: () => { state.erase = !state.erase; buttons(); },
  clear: () => { for (const f of state.frames) { f.strokes.length = 0; paint(f); } },
};
const KEYS = {
  arrowleft: "first", arrowup: "first", arrowright: "second", arrowdown: "second", t: "tie", b: "bad", s: "skip", u: "undo",
  z: "zoom", m: "mark", r: "restart", "[": "smaller", "]": "larger", e: "erase", c: "clear",
};
const BRUSH = ["smaller", "larger", "erase", "clear"];

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const key = event.key.toLowerCase();
  if (!$("card").hidden) {
    if (key === "u" && !$("end").hidden) undo();
    return;
  }
  if (key === "escape") {
    if (state.marking) mark(); else if (state.zoom) zoom();
    return;
  }
  if (/^[1-9]$/.test(key)) { choose(Number(key) - 1); return; }
  const action = KEYS[key];
  if (!action || (BRUSH.includes(action) && !state.marking)) return;
  if ((action === "first" || action === "second") && (state.frames.length !== 2 || event.target === $("prompt"))) return;
  if (action === "restart" && !ranking()) return;
  event.preventDefault();
  actions[action]();
});

addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!button || button.disabled) return;
  actions[button.dataset.do]();
  if (event.detail) button.blur(); // so that the next key is a vote
});
addEventListener("resize", layout);
addEventListener("online", send);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) state.hiddenAt = performance.now();
  else if (state.hiddenAt) { state.hidden += performance.now() - state.hiddenAt; state.hiddenAt = 0; send(); }
});

function finish() {
  state.current = null;
  clearStage();
  buttons();
  $("prompt").textContent = "";
  $("begin").hidden = true;
  $("end").hidden = false;
  $("card").hidden = false;
  $("back").disabled = !state.history.length;
  $("thanks").textContent = state.mine ? `You gave ${state.mine} ${state.mine === 1 ? "vote" : "votes"}. Thank you.` : "There is nothing to vote on.";
  $("again").focus();
}

function welcome() {
  state.current = null;
  state.waiting = [];
  clearStage();
  buttons();
  $("prompt").textContent = "";
  $("begin").hidden = false;
  $("end").hidden = true;
  $("card").hidden = false;
  $("who").value = state.name;
  $("who").focus();
}

function begin(name) {
  state.name = name;
  state.history = kept.get("history." + name, []);
  state.over = false;
  try { kept.set("name", name); } catch { /* it is asked again the next time */ }
  $("name").textContent = name;
  $("card").hidden = true;
  fetchMore();
}

$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("who").value.trim().replace(/\s+/g, " ");
  if (name) begin(name);
});
$("name").addEventListener("click", welcome);
$("again").addEventListener("click", () => { $("card").hidden = true; state.over = false; fetchMore(); });
$("back").addEventListener("click", undo);

(async () => {
  const about = await ask("about");
  if (about.ok) state.about = about.body;
  send();
  const name = kept.get("name", "");
  if (name) begin(name); else welcome();
})();
