
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const {arms, scores, items} = data;
  const SOURCE = data.edits ? arms.length : -1;  // the place of the pictures that are edited, behind those of the arms
  const names = data.edits ? [...arms, "source"] : arms;
  if (data.edits) items.forEach((item) => item.pictures.push(item.source === null ? null : data.sources[item.source]));
  const CHUNK = 24;  // cards that are added at a time, when the end of the grid comes into view

  const element = (name, options = {}, ...children) => {
    const made = Object.assign(document.createElement(name), options);
    made.append(...children);
    return made;
  };
  const fill = (select, names) => names.forEach((name, k) => select.append(element("option", {value: k, textContent: name})));
  const number = (value, digits = 3) => (value === null ? "no score" : value.toFixed(digits));
  const scored = (item, score, k) => (k === SOURCE ? "" : " " + number(item.values[score][k]));
  const signed = (value) => (value === null ? "no score" : (value < 0 ? "" : "+") + value.toFixed(3));
  const difference = (item, score, arm) => {
    const [first, own] = [item.values[score][0], item.values[score][arm]];
    return first === null || own === null ? null : own - first;
  };

  // ---- the grid

  fill($("score"), scores);
  arms.slice(1).forEach((name, k) => $("arm").append(element("option", {value: k + 1, textContent: name})));
  $("score").value = data.primary;
  document.querySelectorAll(".scripted").forEach((each) => { each.hidden = false; });

  let order = [];  // the items that are shown
  let shown = 0;  // how many of them have a card
  const columns = () => [
    ...(data.edits ? [SOURCE] : []),
    ...($("two") && $("two").checked ? [0, Number($("arm").value)] : arms.map((_, k) => k)),
  ];

  const sorted = () => {
    const [score, arm, kind] = [Number($("score").value), Number($("arm").value), $("order").value];
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = items.filter((item) => words.every((word) => item.prompt.toLowerCase().includes(word)));
    const byNumber = (a, b) => a.index - b.index || a.seed - b.seed;
    if (kind === "prompt") return found.sort(byNumber);
    const sign = kind === "best" ? -1 : 1;
    const keyed = found.map((item) => [difference(item, score, arm), item]);
    keyed.sort(([a, one], [b, other]) =>
      (a === null) - (b === null) || (a === null ? 0 : sign * (a - b)) || byNumber(one, other));
    return keyed.map(([, item]) => item);
  };

  const card = (item) => {
    const [score, arm] = [Number($("score").value), Number($("arm").value)];
    const value = difference(item, score, arm);
    const row = element("div", {className: "row"});
    for (const k of columns()) {
      const label = element("span", {className: "label"}, element("b", {textContent: names[k]}), scored(item, score, k));
      if (item.pictures[k] === null) {
        row.append(element("div", {}, element("span", {className: "label", textContent: "no picture"}), label));
        continue;
      }
      const image = element("img", {src: item.pictures[k], alt: names[k] + ": " + item.prompt, decoding: "async"});
      const button = element("button", {type: "button"}, image, label);
      button.addEventListener("click", () => open(item, k, false));
      row.append(button);
    }
    const sign = element("b", {textContent: signed(value), className: value > 0 ? "better" : value < 0 ? "worse" : ""});
    const slide = element("button", {type: "button", textContent: "Slider"});
    slide.setAttribute("aria-label", "Before/after slider of prompt " + item.index + ", seed " + item.seed);
    slide.addEventListener("click", () => open(item, arm, true));
    const foot = element("div", {className: "foot"},
      element("span", {className: "dim", textContent: "#" + item.index + ", seed " + item.seed}), slide);
    return element("article", {className: "card"}, row, element("p", {}, sign, " " + item.prompt), foot);
  };

  const more = () => {
    $("grid").append(...order.slice(shown, shown + CHUNK).map(card));
    shown = Math.min(order.length, shown + CHUNK);
  };
  const near = () => $("more").getBoundingClientRect().top < window.innerHeight + 1200;
  const fillView = () => { while (shown < order.length && near()) more(); };

  const render = () => {
    order = sorted();
    shown = 0;
    $("grid").replaceChildren();
    $("grid").style.setProperty("--card", Math.min(560, 40 + 92 * Math.max(2, columns().length)) + "px");
    $("count").textContent = order.length + " of " + items.length + " prompts and seeds";
    more();
    fillView();
  };
  new IntersectionObserver(fillView, {rootMargin: "1200px"}).observe($("more"));
  addEventListener("scroll", fillView, {passive: true});
  for (const id of ["order", "score", "arm", "two"]) if ($(id)) $(id).addEventListener("change", render);
  let waiting = 0;
  $("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(render, 120); });
  document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());

  // ---- one picture, enlarged, and two under a slider

  const view = {item: null, arm: 0, sliding: false};
  fill($("left"), names);
  fill($("right"), names);

  const show = () => {
    const {item, arm, sliding} = view;
    const score = Number($("score").value);
    const [left, right] = sliding ? [Number($("left").value), Number($("right").value)] : [null, arm];
    $("zoomed").textContent = item.prompt;
    for (const id of ["before", "split", "handle", "pair"]) $(id).hidden = !sliding;
    $("slider").setAttribute("aria-pressed", sliding);
    const put = (image, k) => {
      image.hidden = k === null || item.pictures[k] === null;
      if (image.hidden) return image.removeAttribute("src");
      image.src = item.pictures[k];
      image.alt = names[k] + ": " + item.prompt;
    };
    put($("after"), right);
    put($("before"), left);
    const said = (k) => names[k] + scored(item, score, k) + (item.pictures[k] === null ? " (no picture)" : "");
    const at = "#" + item.index + ", seed " + item.seed + " (" + (order.indexOf(item) + 1) + " of " + order.length + ")";
    const shownNow = sliding ? [left, right] : [right];
    const by = shownNow.some((k) => k !== SOURCE) ? " by " + scores[score] : "";
    $("caption").textContent = shownNow.map(said).join(" | ") + by + ", " + at;
    split();
  };
  const split = () => {
    const share = Number($("split").value);
    $("before").style.clipPath = "inset(0 " + (100 - share) + "% 0 0)";
    $("handle").style.left = share + "%";
  };
  const open = (item, arm, sliding) => {
    Object.assign(view, {item, arm, sliding});
    if (sliding) {
      $("left").value = arm === SOURCE ? SOURCE : 0;
      $("right").value = arm === SOURCE ? $("arm").value : arm || 1;
      $("split").value = 50;
    }
    show();
    if (!$("zoom").open) $("zoom").showModal();
    (sliding ? $("split") : $("next")).focus();
  };
  const toItem = (by) => {
    const at = order.indexOf(view.item) + by;
    if (at < 0 || at >= order.length) return false;
    view.item = order[at];
    return true;
  };
  const toPicture = (by) => {  // the next picture of this prompt, then the first of the next prompt
    if (view.sliding) return void (toItem(by) && show());
    const all = columns();
    const before = {...view};
    let at = Math.max(0, all.indexOf(view.arm));
    do {
      at += by;
      if (at < 0 || at >= all.length) {
        if (!toItem(by)) return void Object.assign(view, before);
        at = by > 0 ? 0 : all.length - 1;
      }
      view.arm = all[at];
    } while (view.item.pictures[view.arm] === null);
    show();
  };

  $("split").addEventListener("input", split);
  for (const id of ["left", "right"]) $(id).addEventListener("change", show);
  $("previous").addEventListener("click", () => toPicture(-1));
  $("next").addEventListener("click", () => toPicture(1));
  $("close").addEventListener("click", () => $("zoom").close());
  $("slider").addEventListener("click", () => open(view.item, view.arm, !view.sliding));
  $("zoom").addEventListener("click", (event) => { if (event.target === $("zoom")) $("zoom").close(); });
  $("zoom").addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!by || event.target.tagName === "SELECT") return;
    const sideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
    if (sideways && view.sliding) {
      if (event.target === $("split")) return;  // the browser moves it
      $("split").value = Number($("split").value) + 5 * by;
      split();
    } else if (sideways) {
      toPicture(by);
    } else if (toItem(by)) {
      show();
    }
    event.preventDefault();
  });

  render();
})();
