/* Votes go into an outbox in localStorage first, and leave it when the server has stored them. So neither a killed server,
   a full disk nor a closed tab loses one. Each has an id, so one that is sent twice is stored once. */

const START = "diffpo.";
const LONGEST = 5000; // ms between two tries

export const kept = {
  get(key, other) {
    try { return JSON.parse(localStorage.getItem(START + key)) ?? other; } catch { return other; }
  },
  set(key, value) { localStorage.setItem(START + key, JSON.stringify(value)); },
  remove(key) { localStorage.removeItem(START + key); },
  keys(start) {
    const own = Object.keys(localStorage).filter((key) => key.startsWith(START + start));
    return own.map((key) => key.slice(START.length)).sort();
  },
};

export function newId() { // crypto.randomUUID is missing where the page is not on localhost
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

export async function ask(what, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  try {
    const reply = await fetch("/api/" + what, options);
    const text = await reply.text();
    if (reply.ok) return { ok: true, status: reply.status, body: JSON.parse(text) };
    let error = text, final = reply.status === 413;
    try { error = JSON.parse(text).error; final = reply.status < 500; } catch { /* a plain sentence, not of the session */ }
    return { ok: false, status: reply.status, error: sentence(error), final }; // final: the same request never succeeds
  } catch {
    return { ok: false, status: 0, error: "The server does not answer." };
  }
}

function sentence(text) {
  const words = String(text).slice(0, 300) || "the server cannot answer";
  return words[0].toUpperCase() + words.slice(1) + (words.endsWith(".") ? "" : ".");
}

// ---- one line above the pictures

let timed = 0;
export function notice(text, ms = 0) {
  const line = document.getElementById("notice");
  if (!text && timed) return; // one with a time of its own stays for it
  clearTimeout(timed);
  timed = ms ? setTimeout(() => { timed = 0; notice(""); }, ms) : 0;
  line.textContent = text;
  if (line.hidden === !text) return;
  line.hidden = !text;
  dispatchEvent(new Event("resize")); // the pictures have less room, or more
}

// ---- the outbox

let sending = false, pause = 1000, timer = 0, stored = () => {};

export function onStored(then) { stored = then; }

export function put(event) { // throws if the browser's storage is full
  kept.set(`out.${String(Date.now()).padStart(14, "0")}.${event.uid}`, event);
  send();
}

export function unsent() {
  return kept.keys("out.").map((key) => kept.get(key, {}));
}

export async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  try {
    for (let key; (key = kept.keys("out.")[0]); ) {
      const event = kept.get(key, null);
      const answer = event ? await ask("event", event) : { ok: true, body: {} };
      if (!answer.ok && !answer.final) {
        const n = kept.keys("out.").length;
        notice(`${answer.error} ${n === 1 ? "1 vote waits" : `${n} votes wait`} in this browser and will be sent again.`);
        timer = setTimeout(send, pause);
        pause = Math.min(LONGEST, pause * 2);
        return;
      }
      if (!answer.ok) {
        kept.set(`refused.${answer.status}.${key.slice(4)}`, event);
        notice(`A vote was refused and is kept in this browser. ${answer.error}`, 8000);
      }
      kept.remove(key);
      pause = 1000;
      if (answer.ok) stored(answer.body.progress);
    }
    notice("");
  } finally { sending = false; }
}

// tasks that a server of another source did not know may be known now
for (const key of kept.keys("refused.404.")) {
  kept.set("out." + key.slice(12), kept.get(key, null));
  kept.remove(key);
}
addEventListener("online", send);
