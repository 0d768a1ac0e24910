// What the theme leaves out for those who use a keyboard or a screen reader: what scrolls sideways can be reached, and
// boxes have names. The theme builds some of it after the page has loaded.
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap").forEach((box) => {
    if (box.scrollWidth > box.clientWidth || box.matches(".md-typeset__scrollwrap")) box.tabIndex = 0;
  });
  document.querySelectorAll(".md-code__nav").forEach((nav, at) => nav.setAttribute("aria-label", `Code ${at + 1}`));
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
}, 100));
