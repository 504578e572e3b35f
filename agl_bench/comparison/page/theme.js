"use strict";
// Before anything is drawn: report.html#theme=dark opens in the dark, as a choice of before does.
(() => {
  const asked = /(?:^#|&)theme=(light|dark)\b/.exec(location.hash);
  let kept = null;
  try { kept = localStorage.getItem("agl-bench-theme"); } catch { kept = null; } // files may have no storage
  const theme = asked ? asked[1] : kept;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
