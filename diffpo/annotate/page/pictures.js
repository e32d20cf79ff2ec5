/* The pictures on the stage: how large they are, zoom that all of them share, and marks drawn with a brush. */

const stage = document.getElementById("stage");
const INK = "255, 64, 129"; // of marks as they are seen

export const view = { frames: [], columns: 1, zoom: null, marking: false, erase: false, brush: 0.035 };

export function clear() {
  stage.replaceChildren();
  view.frames = [];
  view.zoom = null;
}

/* Put pictures on the stage; `strokes` are the marks of each. `chosen(k)` is called for a click, `loaded()` once all can
   be seen, and `changed()` when the layout or the zoom is another. */
export function put(keys, strokes, calls) {
  clear();
  view.calls = calls;
  keys.forEach((key, k) => stage.append(frame(key, k, keys.length, strokes?.[k] ?? [])));
  layout();
}

export const loaded = () => view.frames.length > 0 && view.frames.every((f) => f.box.classList.contains("ready"));

function frame(key, k, total, strokes) {
  const [box, layer, image, canvas, tag] = ["button", "div", "img", "canvas", "span"].map((n) => document.createElement(n));
  box.className = "frame";
  box.type = "button";
  layer.className = "layer";
  image.alt = "";
  image.draggable = false;
  tag.className = total === 2 ? "tag arrow" : "tag";
  tag.textContent = String(k + 1);
  tag.setAttribute("aria-hidden", "true");
  layer.append(image, canvas);
  box.append(layer, tag);
  const own = { box, layer, image, canvas, tag, strokes, k };
  // a click of the keyboard has no detail: it chooses at all times
  box.addEventListener("click", (event) => { if (!event.detail || !(view.marking || view.zoom)) view.calls.chosen(k); });
  image.addEventListener("load", () => {
    box.classList.add("ready");
    layout();
    if (loaded()) view.calls.loaded();
  });
  image.addEventListener("error", () => {
    box.classList.add("failed");
    box.dataset.why = "This picture cannot be shown. Skip it.";
  });
  pointers(own);
  view.frames.push(own);
  image.src = "/picture/" + key;
  return box;
}

// ---- as large as the stage allows

export function layout() {
  const n = view.frames.length;
  if (!n) return;
  const style = getComputedStyle(stage), gap = parseFloat(style.columnGap);
  const width = stage.clientWidth - 2 * parseFloat(style.paddingLeft), height = stage.clientHeight - 2;
  const ratios = view.frames.map((f) => (f.image.naturalWidth || 1) / (f.image.naturalHeight || 1));
  const ratio = ratios.reduce((a, b) => a + b, 0) / n;
  let best = { area: 0, columns: 1, w: 1, h: 1 };
  for (let columns = 1; columns <= n; columns++) {
    const rows = Math.ceil(n / columns);
    const w = (width - gap * (columns - 1)) / columns, h = (height - gap * (rows - 1)) / rows;
    const area = Math.min(w, h * ratio) ** 2 / ratio;
    if (area > best.area * 1.02) best = { area, columns, w, h };
  }
  view.columns = best.columns;
  stage.style.gridTemplateColumns = `repeat(${best.columns}, auto)`;
  view.frames.forEach((f, k) => {
    const w = Math.max(1, Math.min(best.w, best.h * ratios[k]));
    f.box.style.width = `${Math.floor(w)}px`;
    f.box.style.height = `${Math.floor(w / ratios[k])}px`;
    if (n === 2) f.tag.textContent = best.columns === 1 ? "\u2191\u2193"[k] : "\u2190\u2192"[k];
    f.box.setAttribute("aria-label", n === 2 ? `${place(k)} picture is better` : `Picture ${k + 1}`);
    paint(f);
  });
  look();
  view.calls.changed();
}

export function place(k) {
  return view.columns === 1 ? ["Upper", "Lower"][k] : ["Left", "Right"][k];
}

// ---- zoom

function look() {
  for (const f of view.frames) {
    const z = view.zoom, w = f.box.clientWidth, h = f.box.clientHeight;
    f.layer.style.transform = z
      ? `translate(${-z.x * w * (z.scale - 1)}px, ${-z.y * h * (z.scale - 1)}px) scale(${z.scale})` : "";
  }
}

export function zoom() {
  const f = view.frames[0];
  if (!f) return;
  const exact = f.image.naturalWidth / Math.max(1, f.box.clientWidth);
  view.zoom = view.zoom ? null : { x: 0.5, y: 0.5, scale: Math.max(2.5, exact) };
  look();
  view.calls.changed();
}

function scaleBy(factor) {
  view.zoom ??= { x: 0.5, y: 0.5, scale: 1 };
  view.zoom.scale = Math.min(16, view.zoom.scale * factor);
  if (view.zoom.scale <= 1.02) view.zoom = null;
  look();
  view.calls.changed();
}

// ---- mouse, pen and fingers

const limit = (value) => Math.min(1, Math.max(0, value));
const radius = () => view.brush / (view.zoom?.scale ?? 1); // as large on the screen, whatever the zoom

function spot(f, event) { // in the picture, 0 to 1
  const box = f.layer.getBoundingClientRect();
  return [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height];
}

function apart(down) {
  const [a, b] = [...down.values()];
  return Math.max(1, Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY));
}

function pointers(f) {
  const down = new Map();
  let stroke = null, before = 1;
  f.box.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    down.set(event.pointerId, event);
    if (down.size === 2) {
      if (stroke) f.strokes.pop(); // two fingers zoom
      stroke = null;
      before = apart(down);
      paint(f);
    } else if (view.marking) {
      event.preventDefault();
      f.box.setPointerCapture(event.pointerId);
      stroke = { size: radius(), erase: view.erase, points: [spot(f, event)] };
      f.strokes.push(stroke);
      paint(f, event);
    }
  });
  f.box.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId);
    if (last) down.set(event.pointerId, event);
    if (down.size === 2) {
      const now = apart(down);
      scaleBy(now / before);
      before = now;
    } else if (stroke) {
      const all = event.getCoalescedEvents?.() ?? [];
      for (const each of all.length ? all : [event]) stroke.points.push(spot(f, each));
      paint(f, event);
    } else if (view.marking) {
      paint(f, event);
    } else if (view.zoom) {
      pan(f, event, last);
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    f.box.addEventListener(kind, (event) => { down.delete(event.pointerId); stroke = null; paint(f); });
  }
  f.box.addEventListener("pointerleave", () => { if (!stroke) paint(f); });
  f.box.addEventListener("wheel", (event) => { event.preventDefault(); scaleBy(Math.exp(-event.deltaY / 400)); },
    { passive: false });
}

function pan(f, event, last) { // a mouse points at the place, a finger drags the picture
  const box = f.box.getBoundingClientRect(), reach = view.zoom.scale - 1;
  if (event.pointerType === "mouse") {
    view.zoom.x = limit((event.clientX - box.x) / box.width);
    view.zoom.y = limit((event.clientY - box.y) / box.height);
  } else if (last) {
    view.zoom.x = limit(view.zoom.x - (event.clientX - last.clientX) / box.width / reach);
    view.zoom.y = limit(view.zoom.y - (event.clientY - last.clientY) / box.height / reach);
  }
  look();
}

// ---- marks

export function mark(on = !view.marking) {
  view.marking = on && view.frames.length > 0;
  view.erase = false;
  for (const f of view.frames) paint(f);
  view.calls?.changed();
}

export function unmark() {
  for (const f of view.frames) { f.strokes.length = 0; paint(f); }
}

function paint(f, cursor) { // the marks as they are seen, and the brush
  const dots = Math.min(2, devicePixelRatio || 1);
  const w = Math.round(f.box.clientWidth * dots), h = Math.round(f.box.clientHeight * dots);
  if (f.canvas.width !== w || f.canvas.height !== h) { f.canvas.width = w; f.canvas.height = h; }
  const c = f.canvas.getContext("2d");
  c.clearRect(0, 0, w, h);
  draw(c, f.strokes, w, h, `rgb(${INK})`);
  c.globalCompositeOperation = "source-in"; // one transparency, however often strokes cross
  c.fillStyle = `rgba(${INK}, .55)`;
  c.fillRect(0, 0, w, h);
  c.globalCompositeOperation = "source-over";
  if (!cursor || !view.marking) return;
  const [x, y] = spot(f, cursor);
  for (const [colour, grow] of [["#000", dots], ["#fff", 0]]) {
    c.lineWidth = dots;
    c.strokeStyle = colour;
    c.beginPath();
    c.arc(x * w, y * h, radius() * w + grow, 0, 7);
    c.stroke();
  }
}

function draw(c, strokes, w, h, colour) {
  c.lineCap = c.lineJoin = "round";
  c.strokeStyle = colour;
  for (const { size, erase, points } of strokes) {
    c.globalCompositeOperation = erase ? "destination-out" : "source-over";
    c.lineWidth = 2 * size * w;
    c.beginPath();
    c.moveTo(points[0][0] * w, points[0][1] * h);
    for (const [x, y] of points) c.lineTo(x * w, y * h);
    c.stroke();
  }
  c.globalCompositeOperation = "source-over";
}

export function masks() { // {number as shown: PNG in base64}, in the size of the picture, of those with marks
  const found = {};
  for (const f of view.frames) {
    if (!f.strokes.some((each) => !each.erase)) continue;
    const canvas = document.createElement("canvas"), c = canvas.getContext("2d");
    canvas.width = f.image.naturalWidth;
    canvas.height = f.image.naturalHeight;
    draw(c, f.strokes, canvas.width, canvas.height, "#fff");
    c.globalCompositeOperation = "destination-over";
    c.fillStyle = "#000";
    c.fillRect(0, 0, canvas.width, canvas.height);
    found[f.k] = canvas.toDataURL("image/png").split(",")[1];
  }
  return found;
}

addEventListener("resize", layout);
