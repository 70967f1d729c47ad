// Theme, menu, search, copy buttons, place on the page. Every page can be read without it.
const $ = (selector, inside = document) => inside.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const root = document.documentElement, up = document.currentScript?.dataset.up ?? $("script[data-up]").dataset.up;

// theme: what the reader chose, else what the system says
const darkBySystem = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : darkBySystem.matches;
const showTheme = () => $(".theme-button").setAttribute("aria-pressed", isDark());
$(".theme-button").onclick = () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme) } catch {}
  showTheme();
};
darkBySystem.onchange = showTheme;
showTheme();

// the menu of a narrow screen
const menuButton = $(".menu-button"), sidebar = $("#pages");
const openMenu = (open) => {
  sidebar.classList.toggle("open", open);
  menuButton.setAttribute("aria-expanded", open);
  if (open) $("[aria-current], a", sidebar).focus();
};
menuButton.onclick = () => openMenu(!sidebar.classList.contains("open"));
sidebar.onkeydown = (event) => { if (event.key === "Escape" && sidebar.classList.contains("open")) { openMenu(false); menuButton.focus() } };
const current = $("[aria-current]", sidebar);
if (current) sidebar.scrollTop = current.offsetTop - sidebar.clientHeight / 2;

// what scrolls sideways can be reached with the keyboard
const reachable = () => all("pre, .table-wrap, .cell-output-html, math[display=block]").forEach((box) => {
  const wide = box.scrollWidth > box.clientWidth;
  wide ? box.setAttribute("tabindex", 0) : box.removeAttribute("tabindex");
});
reachable();
addEventListener("resize", reachable);
all("details").forEach((fold) => fold.addEventListener("toggle", reachable));

// links to headings, copy buttons
for (const heading of all("article :is(h2, h3, h4)[id], article section[id] > :is(h2, h3, h4):first-child")) {
  const link = Object.assign(document.createElement("a"), { className: "anchor", textContent: "#", href: "#" + (heading.id || heading.parentElement.id) });
  link.setAttribute("aria-label", "Link to " + heading.textContent);
  heading.append(link);
}
for (const block of all("article div.sourceCode")) {
  const button = Object.assign(document.createElement("button"), { className: "copy", type: "button", textContent: "Copy" });
  button.onclick = async () => {
    await navigator.clipboard.writeText($("code", block).innerText);
    button.textContent = "Copied";
    setTimeout(() => button.textContent = "Copy", 1500);
  };
  block.append(button);
}

// mark the part that is being read
const places = all(".toc a").map((link) => [link, document.getElementById(decodeURIComponent(link.hash.slice(1)))]);
let marked;
const follow = () => {
  const [link] = places.findLast(([, heading]) => heading && heading.getBoundingClientRect().top < 120) ?? [];
  if (link === marked) return;
  marked?.classList.remove("here");
  (marked = link)?.classList.add("here");
  const list = $(".toc");
  if (link && list.scrollHeight > list.clientHeight) list.scrollTop = link.offsetTop - list.clientHeight / 3;
};
addEventListener("scroll", follow, { passive: true });
follow();

// search: every word must occur; names and headings count more than text
const dialog = $("dialog.search"), input = $("input", dialog), results = $("#found"), hint = $(".hint", dialog);
const idle = hint.textContent;
const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
let chosen = -1;
const load = () => new Promise((done) => {
  if (window.searchIndex) return done();
  document.head.append(Object.assign(document.createElement("script"), { src: up + "search.js", onload: done }));
});
const openSearch = async () => { if (dialog.open) return; dialog.showModal(); input.select(); await load(); find() };
function score([, title, name, api, text], words) {
  let sum = 0;
  for (const word of words) {
    const at = name.toLowerCase(), last = at.split(".").pop();
    if (at === word || last === word) sum += api ? 60 : 50;
    else if (at.startsWith(word) || last.startsWith(word)) sum += api ? 30 : 25;
    else if (at.includes(word)) sum += 15;
    else if (title.toLowerCase().includes(word)) sum += 6;
    else if (text.toLowerCase().includes(word)) sum += 2;
    else return 0;
  }
  return sum - name.length / 100;
}
function snippet(text, words) {
  const at = Math.min(...words.map((w) => text.toLowerCase().indexOf(w)).filter((i) => i >= 0), text.length);
  const from = at === text.length ? 0 : Math.max(0, at - 40), part = text.slice(from, from + 130);
  return mark((from ? "… " : "") + part + (from + 130 < text.length ? " …" : ""), words);
}
function mark(text, words) {
  const pattern = words.map((w) => escape(w).replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  return escape(text).replace(new RegExp(pattern, "gi"), (found) => `<mark>${found}</mark>`);
}
function find() {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length && window.searchIndex
    ? searchIndex.map((entry) => [score(entry, words), entry]).filter(([s]) => s > 0).sort((a, b) => b[0] - a[0]).slice(0, 20) : [];
  results.innerHTML = found.map(([, [url, title, name, api, text]], i) =>
    `<li role="option" id="result-${i}" aria-selected="false" data-url="${up}${url}"><i>${name === title ? "" : escape(title)}</i><b${api ? ' class="name"' : ""}>${mark(name, words)}</b><small>${snippet(text, words)}</small></li>`).join("");
  hint.textContent = !words.length ? idle : found.length ? `${found.length}${found.length === 20 ? " best" : ""} results` : `Nothing has “${input.value}”.`;
  input.setAttribute("aria-expanded", found.length > 0);
  choose(found.length ? 0 : -1);
}
function choose(i) {
  const items = [...results.children];
  items[chosen]?.setAttribute("aria-selected", "false");
  chosen = items.length ? (i + items.length) % items.length : -1;
  items[chosen]?.setAttribute("aria-selected", "true");
  items[chosen]?.scrollIntoView({ block: "nearest" });
  chosen < 0 ? input.removeAttribute("aria-activedescendant") : input.setAttribute("aria-activedescendant", "result-" + chosen);
}
$(".search-button").onclick = openSearch;
input.oninput = find;
input.onkeydown = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); choose(chosen + step) }
  if (event.key === "Enter" && chosen >= 0) { event.preventDefault(); results.children[chosen].click() }
};
results.onclick = (event) => {
  const item = event.target.closest("[data-url]");
  if (item) { dialog.close(); location.href = item.dataset.url }
};
dialog.onclick = (event) => { if (event.target === dialog) dialog.close() };
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  if (!typing && !event.ctrlKey && !event.metaKey && event.key === "/" || (event.ctrlKey || event.metaKey) && event.key === "k") {
    event.preventDefault();
    openSearch();
  }
});
