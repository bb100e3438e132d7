// Optional comfort only: the page tells everything without it.
"use strict";
(() => {
  // Tips at once and on touch: a drawing's <title> becomes its label and the text of one floating box.
  const box = document.createElement("div");
  box.className = "tip";
  box.setAttribute("aria-hidden", "true");
  document.body.append(box);
  for (const title of document.querySelectorAll("svg title")) {
    const owner = title.parentElement;
    owner.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointerover", (event) => {
    const owner = event.target.closest("[data-tip]");
    box.classList.toggle("shown", owner !== null);
    if (owner === null) return;
    box.textContent = owner.dataset.tip;
    const place = owner.getBoundingClientRect(), size = box.getBoundingClientRect();
    const left = place.left + place.width / 2 - size.width / 2;
    const above = place.top - size.height - 6;
    box.style.left = `${Math.max(4, Math.min(left, innerWidth - size.width - 4))}px`;
    box.style.top = `${above < 4 ? place.bottom + 6 : above}px`;
  });
  document.addEventListener("scroll", () => box.classList.remove("shown"), { passive: true });
  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
