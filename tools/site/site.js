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
const reachable = () => all("pre, .table-wrap, .cell-output, .cell-output-html, math[display=block]").forEach((box) => {
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

// search: words count by how rare they are, whole words more than beginnings, headings more than text
const dialog = $("dialog.search"), input = $("input", dialog), results = $("#found"), hint = $(".hint", dialog);
const idle = hint.textContent;
const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const FILLER = new Set("a an and are at be by can could do does for from how i if in is it me my of on or our should that the there this to want was we what when where which who why will with would you your".split(" "));
const split = (text) => text.toLowerCase().match(/--?[a-z][\w.-]*\w|[\p{L}\p{N}_]+(?:[.-][\p{L}\p{N}_]+)*/gu) ?? [];
const stem = (word) => word.length > 3 && !/^-|[._]/.test(word) ? word.replace(/(?:(?<=[^aeiou])(?:ies|ing|ed|es)|(?<!s)s)$/, (end) => end === "ies" ? "y" : "") : word;
let chosen = -1, prepared;
const load = () => new Promise((done) => {
  if (window.searchIndex) return done();
  document.head.append(Object.assign(document.createElement("script"), { src: up + "search.js", onload: done }));
});
const openSearch = async () => { if (dialog.open) return; dialog.showModal(); input.select(); await load(); find() };
function prepare() {  // the words of every section, and in how many sections each of them is
  const counts = new Map(), bag = (text) => new Set(split(text).flatMap((word) => [word, stem(word), ...word.split(/[.-]+/).filter(Boolean)]));
  const sections = searchIndex.map((entry) => {
    const [, title, name, , text] = entry, words = { name: bag(name), title: bag(title), text: bag(text) };
    for (const word of new Set([...words.name, ...words.title, ...words.text])) counts.set(word, 1 + (counts.get(word) ?? 0));
    return { entry, words };
  });
  return { sections, vocabulary: [...counts.keys()], rarity: (word) => Math.log(1 + sections.length / (1 + (counts.get(word) ?? 0))) };
}
function terms(query) {  // a question without its small words; of the last word the beginning is enough
  const all = split(query), wanted = all.filter((word) => !FILLER.has(word));
  return (wanted.length ? wanted : all).map((word, i, { length }) => {
    const open = i === length - 1 && !/\s$/.test(query) || /^-/.test(word);
    const begins = (other) => other.startsWith(word) || open && other.startsWith(stem(word));
    const whole = new Set([word, stem(word)]), begun = prepared.vocabulary.filter(begins);
    return { word, whole, begun, weight: Math.min(prepared.rarity(word), prepared.rarity(stem(word))) };
  });
}
function score({ entry: [, title, name, api], words }, wanted, share) {
  const any = (set, list) => { for (const word of list) if (set.has(word)) return true; return false };
  let sum = 0, met = 0, total = 0;
  for (const { word, whole, begun, weight } of wanted) {
    const at = name.toLowerCase(), grade = Math.max(
      at === word || at.split(".").pop() === word ? 14 + api : 0, any(words.name, whole) ? 8 : any(words.name, begun) ? 4 : 0,
      any(words.title, whole) ? 3 : 0, any(words.text, whole) ? 2 : any(words.text, begun) ? 1 : 0);
    total += weight;
    if (grade) met += weight;
    sum += grade * weight + (any(words.title, whole) ? weight : 0);
  }
  // a heading that has all words of a question is its answer
  if (wanted.length > 1 && wanted.every(({ whole }) => any(words.name, whole))) sum *= 2;
  const needed = share ?? (wanted.length > 2 ? .6 : .999);  // of a long question not every word has to be there
  if (name.startsWith("-") && !wanted.some(({ word }) => word.startsWith("-"))) sum /= 4;  // a flag is not what a word asks for
  return met >= needed * total ? sum * met / total / (1 + split(name).length / 12) : 0;
}
const pattern = (wanted) => new RegExp(`(?<![\\p{L}\\p{N}_-])(?:${wanted.flatMap(({ word }) => [word, stem(word)])
  .map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})[\\p{L}\\p{N}_]*`, "giu");
function snippet(text, wanted) {
  const at = text.search(pattern(wanted)), from = at < 0 ? 0 : Math.max(0, at - 40), part = text.slice(from, from + 130);
  return mark((from ? "… " : "") + part + (from + 130 < text.length ? " …" : ""), wanted);
}
function mark(text, wanted) {  // whole words, in pieces so that what is escaped stays whole
  let done = 0, html = "";
  for (const found of text.matchAll(pattern(wanted))) {
    html += escape(text.slice(done, found.index)) + `<mark>${escape(found[0])}</mark>`;
    done = found.index + found[0].length;
  }
  return html + escape(text.slice(done));
}
function find() {
  if (window.searchIndex) prepared ??= prepare();
  const words = prepared ? terms(input.value) : [];
  const best = (share) => prepared.sections.map((section) => [score(section, words, share), section.entry])
    .filter(([s]) => s > 0).sort((a, b) => b[0] - a[0]).slice(0, 20);
  const complete = words.length ? best() : [];  // if no section has all that is asked, those that have most of it
  const found = complete.length || words.length < 2 ? complete : best(.3);
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
