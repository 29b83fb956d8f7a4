// What the pages do besides being read: parts that load late, and the reader of a sequence. All text
// comes from the server's own templates, which escape it.
"use strict";

async function part(url, signal) {
  const answer = await fetch(url, { headers: { "x-part": "1" }, signal, credentials: "same-origin" });
  const frame = document.createElement("template");
  frame.innerHTML = await answer.text();
  return frame.content;
}

// Parts: an element with data-load is replaced by what its address gives; with data-refresh again
// after so many milliseconds.
function awaken(root) {
  for (const element of root.querySelectorAll("[data-load]:not([data-loaded])")) load(element, element.dataset.load);
  for (const element of root.querySelectorAll("[data-refresh]"))
    setTimeout(() => element.isConnected && refresh(element), Number(element.dataset.refresh));
  for (const link of root.querySelectorAll("a[data-follow]")) follow(link);
}

async function load(element, url) {
  element.setAttribute("aria-busy", "true");
  try {
    const content = await part(url);
    const holder = document.createElement("div");
    holder.append(content);
    const parent = element.parentNode;
    element.replaceWith(...holder.childNodes);
    if (parent) awaken(parent);
  } catch (error) {
    if (element.dataset.refresh) setTimeout(() => element.isConnected && refresh(element), 5000);
    else element.textContent = "The server does not answer.";
  }
}

async function refresh(element) {
  const before = element.textContent;
  const id = element.id;
  await load(element, element.dataset.load);
  const now = document.getElementById(id);
  const map = document.getElementById("shards");
  if (now && map && now.textContent !== before && map.dataset.load) load(map, map.dataset.load);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-into]");
  if (!link || event.metaKey || event.ctrlKey) return;
  event.preventDefault();
  const target = document.querySelector(link.dataset.into);
  if (target) load(target, link.href);
});

// A search that has found nothing yet goes on by itself, a stretch at a time, until it does.
async function follow(link) {
  const id = link.dataset.follow;
  const stop = document.createElement("button");
  stop.type = "button";
  stop.textContent = "Stop";
  link.after(" ", stop);
  let stopped = false;
  stop.addEventListener("click", () => { stopped = true; stop.remove(); });
  let content;
  try { content = await part(link.href); } catch (error) { stop.remove(); return; }
  const found = content.querySelector(id);
  const old = document.querySelector(id);
  if (!stopped && found && old && link.isConnected) {
    old.replaceWith(found);
    awaken(found);
  }
}

// The reader.
function reader(root) {
  const text = root.querySelector(".text");
  const panel = root.querySelector(".panel");
  const help = panel.innerHTML;
  const known = new Map();
  let current = null;
  let pinned = false;
  let waiting = 0;
  let asked = null;

  const at = (position) => root.querySelector("#t" + position);
  const number = (token) => Number(token.id.slice(1));

  function mark(token) {
    for (const old of text.querySelectorAll(".open, .after")) {
      old.classList.remove("open", "after");
      old.setAttribute("aria-selected", "false");
    }
    current = token;
    if (!token) { text.removeAttribute("aria-activedescendant"); return; }
    token.classList.add("open");
    token.setAttribute("aria-selected", "true");
    text.setAttribute("aria-activedescendant", token.id);
    const next = at(number(token) + 1);
    if (next && token.classList.length > 2) next.classList.add("after");
  }

  async function show(token) {
    mark(token);
    const position = number(token);
    asked = position;
    if (!known.has(position)) {
      const query = root.dataset.query;
      const url = root.dataset.positionUrl + position + (query ? "?" + query : "");
      known.set(position, part(url).then((content) => {
        const holder = document.createElement("div");
        holder.append(content);
        return holder.innerHTML;
      }));
    }
    try {
      const html = await known.get(position);
      if (asked !== position) return;
      panel.innerHTML = html;
      panel.classList.add("filled");
    } catch (error) {
      known.delete(position);
      panel.textContent = "The server does not answer.";
    }
  }

  function close() {
    asked = null;
    pinned = false;
    mark(null);
    panel.innerHTML = help;
    panel.classList.remove("filled");
  }

  function pin(token, keepAddress) {
    pinned = true;
    if (!keepAddress) history.replaceState(null, "", "#" + token.id);
    return show(token);
  }

  text.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse" || pinned) return;
    const token = event.target.closest(".t");
    clearTimeout(waiting);
    if (token) waiting = setTimeout(() => show(token), 40);
  });
  text.addEventListener("click", (event) => {
    const token = event.target.closest(".t");
    if (!token) return;
    clearTimeout(waiting);
    if (pinned && token === current) { close(); return; }
    pin(token);
  });
  panel.addEventListener("click", (event) => { if (event.target.closest(".close")) close(); });

  function step(token, by) { return at(number(token) + by); }
  function line(token, by) {
    // The token under the same place of the next line.
    const box = token.getClientRects()[0];
    let best = null, distance = Infinity, y = null;
    for (let next = step(token, by), seen = 0; next && seen < 400; next = step(next, by), seen++) {
      const place = next.getClientRects()[0];
      if (!place || Math.abs(place.top - box.top) < 4) continue;
      if (y === null) y = place.top;
      if (Math.abs(place.top - y) > 4) break;
      const away = Math.abs(place.left - box.left);
      if (away < distance) { distance = away; best = next; }
    }
    return best;
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "[" || event.key === "]") {
      document.querySelector(event.key === "[" ? 'a[rel="prev"]' : 'a[rel="next"]')?.click();
      return;
    }
    if (event.key === "Escape") { close(); return; }
    if (event.target !== text && event.target !== document.body && event.target.id !== "main") return;
    const moves = { ArrowLeft: (t) => step(t, -1), ArrowRight: (t) => step(t, 1),
      ArrowUp: (t) => line(t, -1), ArrowDown: (t) => line(t, 1) };
    if (!(event.key in moves)) return;
    if (!current && event.target !== text) return;
    const next = current ? moves[event.key](current) : at(0);
    event.preventDefault();
    if (next) { pin(next); next.scrollIntoView({ block: "nearest" }); }
  });

  async function open(position) {
    const token = at(position);
    if (!token) return;
    await pin(token, true);
    // On a phone the panel covers the lower half.
    token.scrollIntoView({ block: getComputedStyle(panel).position === "fixed" ? "start" : "center" });
  }
  function follow_address() {
    const found = /^#t(\d+)$/.exec(location.hash);
    if (found) open(found[1]);
  }
  addEventListener("hashchange", follow_address);
  if (location.hash) follow_address();
  else if (root.dataset.open) open(root.dataset.open);

  const colours = [...root.querySelectorAll("[data-colour-by]")];
  function colour(by) {
    root.dataset.colour = by;
    for (const button of colours) {
      button.setAttribute("aria-checked", String(button.dataset.colourBy === by));
      button.tabIndex = button.dataset.colourBy === by ? 0 : -1;
    }
    try { sessionStorage.setItem("retort-colour", by); } catch (error) { /* kept off */ }
  }
  for (const button of colours) {
    button.addEventListener("click", () => colour(button.dataset.colourBy));
    button.addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      const other = colours.find((b) => b !== button);
      colour(other.dataset.colourBy);
      other.focus();
    });
  }
  let kept = null;
  try { kept = sessionStorage.getItem("retort-colour"); } catch (error) { /* kept off */ }
  if (colours.some((button) => button.dataset.colourBy === kept)) colour(kept);
}

awaken(document);
for (const root of document.querySelectorAll(".reader")) reader(root);
