// Charts stand in the page as drawings; each is made interactive when it comes into view.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specs = read("charts");
// No eval, as the page's policy forbids it: expressions are interpreted.
const OPTIONS = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
  tooltip: { disableDefaultStyle: true } };

async function draw(place, spec) {
  const stage = document.createElement("div");
  const { view } = await vegaEmbed(stage, spec, OPTIONS);
  place.replaceChildren(stage);
  return view;
}

const watch = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watch.unobserve(target);
    draw(target, specs[target.id]);
  }
}, { rootMargin: "100px" });
for (const id of Object.keys(specs)) watch.observe(document.getElementById(id));

// Paper cannot be unfolded; tables of the charts' numbers stay folded, as the charts are printed.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.numbers-of)")) details.open = true;
});
