"use strict";
(() => {
  const root = document.documentElement;

  // Theme: system, light, dark.
  const themes = ["", "light", "dark"];
  const theme = document.getElementById("theme");
  const say = () => { theme.textContent = `Theme: ${root.dataset.theme || "system"}`; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "") + 1) % themes.length];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    try { localStorage.setItem("agl-bench-theme", next); } catch { return say(); } // files may have no storage
    say();
  });
  say();

  // Folds: all at once, the target of a link, and everything on paper.
  const folds = [...document.querySelectorAll("main details")];
  const unfold = document.getElementById("unfold");
  unfold.hidden = false;
  unfold.addEventListener("click", () => {
    const open = folds.some((fold) => !fold.open);
    folds.forEach((fold) => { fold.open = open; });
    unfold.textContent = open ? "Fold all" : "Unfold all";
  });
  if (/(?:^#|&)unfold\b/.test(location.hash)) unfold.click(); // report.html#unfold
  const reveal = () => {
    const target = document.getElementById(location.hash.slice(1));
    const fold = target && target.querySelector("details");
    if (fold) { fold.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let before = [];
  addEventListener("beforeprint", () => { before = folds.map((f) => f.open); folds.forEach((f) => { f.open = true; }); });
  addEventListener("afterprint", () => folds.forEach((f, i) => { f.open = before[i]; }));

  // Tables: a heading sorts its column, once more the other way. Empty values stay last; controls stay below.
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  const sort = (table, column, up) => {
    for (const body of table.tBodies) {
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (up ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    }
  };
  document.querySelectorAll("table").forEach((table) => {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const first = heading.classList.contains("number") ? "descending" : "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const next = heading.getAttribute("aria-sort") === first ? second : first;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", next);
        sort(table, column, next === "ascending");
      });
    });
  });

  // Figures: enlarged to the window, once more to their own size.
  const large = document.getElementById("large");
  const [picture, words] = [large.querySelector("img"), large.querySelector("p")];
  document.querySelectorAll("button.zoom").forEach((button) => {
    button.addEventListener("click", () => {
      const shown = button.querySelector("img");
      picture.src = shown.src;
      picture.alt = shown.alt;
      picture.classList.remove("whole");
      words.textContent = button.parentElement.querySelector("figcaption").textContent;
      large.showModal();
    });
  });
  picture.addEventListener("click", () => picture.classList.toggle("whole"));
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
})();
