"use strict";
for (const link of document.querySelectorAll(".download")) link.href = document.getElementById(link.dataset.picture).src;

const drawn = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-size"];
for (const link of document.querySelectorAll(".drawing")) link.addEventListener("click", () => {
  const shown = link.closest("figure").querySelector("svg"), copy = shown.cloneNode(true);
  const parts = [...copy.querySelectorAll("*")];
  shown.querySelectorAll("*").forEach((part, number) => {
    for (const name of drawn) parts[number].setAttribute(name, getComputedStyle(part)[name]);
  });
  copy.style.background = getComputedStyle(link.closest("figure")).backgroundColor;
  link.href = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
});

for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  const number = (text) => parseFloat(text.replace("−", "-"));
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].textContent, row]);
    const numeric = rows.some(([text]) => !isNaN(number(text)));
    const ascending = head.getAttribute("aria-sort") === (numeric ? "descending" : "none");
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    rows.sort(([a], [b]) => {
      const [p, q] = [number(a), number(b)];
      if (numeric && (isNaN(p) || isNaN(q))) return isNaN(p) - isNaN(q);
      return (ascending ? 1 : -1) * (numeric ? p - q : a.localeCompare(b));
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}

const viewer = document.getElementById("viewer");
if (viewer) {
  const one = (selector) => viewer.querySelector(selector);
  const [stage, slider, cross] = [one(".stage"), one(".slider input"), one(".cross")];
  const data = document.getElementById("maps");
  const maps = data ? JSON.parse(data.textContent) : [];
  let chosen = null, at = [0.5, 0.5];
  viewer.hidden = false;

  const cut = () => stage.style.setProperty("--cut", slider.value + "%");
  const read = (x, y) => {
    at = [x, y].map((value) => Math.min(0.999, Math.max(0, value)));
    cross.hidden = !maps.length || !("aligned" in chosen.dataset);
    stage.style.setProperty("--x", 100 * at[0] + "%");
    stage.style.setProperty("--y", 100 * at[1] + "%");
    if (!cross.hidden) viewer.querySelectorAll(".readout dd").forEach((place, number) => {
      const { rows, columns, values, ranks } = maps[number];
      const cell = Math.floor(at[1] * rows) * columns + Math.floor(at[0] * columns);
      const [meter, rank, value] = place.children;
      meter.value = ranks[cell];
      rank.textContent = ranks[cell] + " %";
      value.textContent = values[cell];
    });
  };
  const choose = (radio) => {
    chosen = radio;
    for (const side of ["before", "after"]) {
      const source = document.getElementById(radio.dataset[side]);
      Object.assign(one("." + side), { src: source.src, alt: source.alt });
      one(side === "before" ? ".left" : ".right").textContent = source.closest("figure").querySelector("strong").textContent;
    }
    cross.hidden = true;
  };
  viewer.querySelectorAll("[name=comparison]").forEach((radio) => {
    radio.addEventListener("change", () => choose(radio));
    if (radio.checked) choose(radio);
  });
  slider.addEventListener("input", cut);
  stage.addEventListener("pointermove", (event) => {
    const box = stage.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (event.buttons || event.pointerType === "touch") { slider.value = 100 * x; cut(); }
    read(x, y);
  });
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, -0.02], ArrowDown: [0, 0.02] }[event.key];
    if (!step) return;
    event.preventDefault();
    read(at[0] + step[0], at[1] + step[1]);
  });
  cut();
}
