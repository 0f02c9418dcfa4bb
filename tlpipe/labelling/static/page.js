// Shows one question at a time; what people type becomes a decision, saved before it is shown.
"use strict";
const LETTERS = "abcefghijlmnopqrstuvwxy"; // d, k and z are taken
const $ = (id) => document.getElementById(id);
let state = null, queue = null, items = [], place = 0, busy = false;
const past = []; // what this page has decided, to be undone
const loaded = new Map(); // images that are asked for before they are shown

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail);
  return found;
}

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never as HTML: names are anybody's text
  if (parent) parent.append(made);
  return made;
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function keyOf(number) {
  if (state.classes.length <= 9) return String(number + 1);
  if (state.classes.length <= 9 + LETTERS.length) {
    return number < 9 ? String(number + 1) : LETTERS[number - 9];
  }
  return "";
}

const filters = () => state.classes.length > 9 + LETTERS.length;

function listed() {
  // Suggested ones first where there are many classes; as typed, those that begin so before others.
  const item = items[place], wanted = $("filter").value.trim().toLowerCase();
  if (!filters()) return state.classes;
  const rank = (name) => {
    const plain = name.toLowerCase();
    if (wanted) return plain === wanted ? 0 : plain.startsWith(wanted) ? 1 : 2;
    return item && item.suggested.includes(name) ? 0 : 1;
  };
  return state.classes
    .filter((name) => name.toLowerCase().includes(wanted))
    .sort((a, b) => rank(a) - rank(b));
}

function shownQueues() {
  $("queues").replaceChildren();
  state.queues.forEach((one) => {
    const button = element("button", `${one.title}: ${one.left} left`, $("queues"));
    button.type = "button";
    button.setAttribute("aria-current", String(one.name === queue));
    button.addEventListener("click", () => open(one.name));
  });
}

function preload() {
  for (const item of items.slice(place, place + 4)) {
    for (const image of item.images) {
      if (loaded.has(image.key)) continue;
      const made = new Image();
      made.src = `image/${image.key}`;
      loaded.set(image.key, made);
    }
  }
  while (loaded.size > 64) loaded.delete(loaded.keys().next().value);
}

function show() {
  shownQueues();
  const item = items[place], images = $("images");
  images.replaceChildren();
  const one = state.queues.find((each) => each.name === queue);
  $("answers").hidden = !item;
  if (!item) {
    $("place").textContent = "";
    $("why").textContent = (one && one.note) || "There is nothing to decide in this queue.";
    $("decision").hidden = true;
    return;
  }
  $("place").textContent = `${place + 1} of ${items.length}${one.listed ? " listed" : ""}, ${one.left} left`;
  item.images.forEach((image) => {
    const figure = element("figure", undefined, images);
    const shown = element("img", undefined, figure);
    shown.src = `image/${image.key}`;
    shown.alt = image.path;
    const caption = element("figcaption", undefined, figure);
    if (image.label) element("b", image.label, caption);
    element("span", image.path, caption);
  });
  $("why").textContent = item.why;
  $("decision").hidden = !item.decision;
  if (item.decision) {
    const { what, by, at } = item.decision;
    $("decision").textContent = `Decided: ${what}${by ? `, by ${by}` : ""}, ${at}. z undoes it.`;
  } else if (one.left === 0) {
    $("decision").hidden = false;
    $("decision").textContent = "All of this queue is decided.";
  }
  showClasses();
  const still = Boolean(state.read_only) || Boolean(item.decision);
  $("drop").disabled = still;
  $("keep").disabled = still || !item.can_keep;
  $("undo").disabled = Boolean(state.read_only) || !(item.decision || past.length);
  $("back").disabled = place === 0;
  $("next").disabled = place + 1 >= items.length;
  preload();
}

function showClasses() {
  const item = items[place];
  $("filter").hidden = !filters();
  $("classes").replaceChildren();
  listed().forEach((name, number) => {
    const button = element("button", undefined, $("classes"));
    button.type = "button";
    const typed = $("filter").value.trim() !== "";
    const key = filters() ? (typed && number === 0 ? "⏎" : "") : keyOf(number);
    if (key) element("kbd", key, button);
    button.append(name);
    button.classList.toggle("suggested", item.suggested.includes(name));
    button.classList.toggle("had", item.images.every((image) => image.label === name));
    button.disabled = Boolean(state.read_only) || Boolean(item.decision);
    button.addEventListener("click", () => decide("class", name));
  });
  $("help").textContent = filters()
    ? "Type part of a class and Enter. Esc leaves the field for d drop, k keep, z undo; / returns."
    : "A key for each class, d drop, k keep, z undo, arrows to look back and on.";
}

function firstOpen(from) {
  const found = items.findIndex((item, number) => number >= from && !item.decision);
  return found >= 0 ? found : items.findIndex((item) => !item.decision);
}

async function open(name, at) {
  queue = name;
  items = (await ask(`queue/${name}`)).items;
  const wanted = at === undefined ? -1 : items.findIndex((item) => item.key === at);
  const start = wanted >= 0 ? wanted : firstOpen(0);
  place = start >= 0 ? start : Math.max(items.length - 1, 0);
  say(state.read_only);
  show();
}

async function renewed(found) {
  // The order of the most useful ones is another one after each round.
  const before = state.queues.find((one) => one.name === queue).order;
  state = found;
  if (state.queues.find((one) => one.name === queue).order !== before) await open(queue);
}

async function act(work) {
  if (busy) return;
  busy = true;
  try { await work(); say(state.read_only); } catch (error) {
    await open(queue, items[place] && items[place].key).catch(() => {});
    say(error.message);
  }
  busy = false;
}

const decide = (action, label = "") => act(async () => {
  const item = items[place];
  if (!item || item.decision || state.read_only) return;
  const found = await ask("decide", { queue, item: item.key, action, label });
  item.decision = found.decision;
  past.push({ queue, key: item.key, decision: item.decision.id });
  $("filter").value = "";
  const next = firstOpen(place + 1);
  if (next >= 0) place = next;
  await renewed(found);
  show();
});

const undo = () => act(async () => {
  if (state.read_only) return;
  const item = items[place];
  const shown = item && item.decision;
  const last = shown ? { queue, key: item.key, decision: shown.id } : past.pop();
  if (!last) return;
  const number = past.findIndex((one) => one.decision === last.decision);
  if (number >= 0) past.splice(number, 1);
  state = await ask("undo", { decision: last.decision });
  await open(last.queue, last.key);
});

function go(step) {
  if (place + step >= 0 && place + step < items.length) { place += step; show(); }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state) return;
  const typing = document.activeElement === $("filter");
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    if (typing && $("filter").value) return;
    event.preventDefault();
    return go(event.key === "ArrowLeft" ? -1 : 1);
  }
  if (typing) {
    if (event.key === "Escape") { $("filter").value = ""; showClasses(); $("filter").blur(); }
    if (event.key === "Enter" && $("filter").value.trim() && listed().length) {
      decide("class", listed()[0]);
    }
    return;
  }
  if (event.repeat) return;
  if (event.key === "d") return decide("drop");
  if (event.key === "k") return decide("keep");
  if (event.key === "z") return undo();
  if (event.key === "/" && filters()) { event.preventDefault(); return $("filter").focus(); }
  const number = state.classes.findIndex((_, each) => keyOf(each) === event.key);
  if (number >= 0) decide("class", state.classes[number]);
});

$("filter").addEventListener("input", showClasses);
$("drop").addEventListener("click", () => decide("drop"));
$("keep").addEventListener("click", () => decide("keep"));
$("undo").addEventListener("click", undo);
$("back").addEventListener("click", () => go(-1));
$("next").addEventListener("click", () => go(1));

(async () => {
  try {
    state = await ask("state");
    $("title").textContent = state.title;
    document.title = `label ${state.title}`;
    const first = state.queues.find((one) => one.left) || state.queues[0];
    await open(first.name);
    if (filters()) $("filter").focus();
  } catch (error) { say(error.message); }
})();
