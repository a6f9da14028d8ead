"""The words of the demo language, with their French.

Everything is plain text so that adding a word is one edit:

* ``NOUNS``: topic -> "english french gender" entries. Gender is ``m`` or ``f``;
  a following ``u`` marks an uncountable noun ("bread"), ``p`` a plural-only one ("shoes").
* ``ADJECTIVES``: "english french" entries by polarity; the feminine is derived by
  rule unless given as ``masculine/feminine``.
* ``VERBS``: "past base participle" entries, all conjugated with *avoir* in French.

The topic ``things`` holds everyday objects that belong to no topic.
"""

NOUNS = {
    "food": """
apple pomme f, banana banane f, orange orange f, lemon citron m, pear poire f, peach pêche f, cherry cerise f,
strawberry fraise f, grape raisin m, melon melon m, tomato tomate f, potato patate f, carrot carotte f, onion oignon
m, cucumber concombre m, mushroom champignon m, salad salade f, soup soupe f, pizza pizza f, sandwich sandwich m,
burger burger m, omelette omelette f, egg œuf m, cheese fromage mu, bread pain mu, butter beurre mu, rice riz mu,
pasta pâtes fp, noodle nouille f, sausage saucisse f, steak steak m, chicken poulet m, ham jambon mu, bacon bacon
mu, beef bœuf mu, pork porc mu, lamb agneau m, shrimp crevette f, lobster homard m, sauce sauce f, salt sel mu,
pepper poivre mu, sugar sucre mu, honey miel mu, jam confiture f, chocolate chocolat mu, cake gâteau m, cookie
biscuit m, pie tarte f, pancake crêpe f, waffle gaufre f, muffin muffin m, yogurt yaourt m, milk lait mu, coffee
café m, tea thé m, juice jus m, water eau fu, wine vin m, beer bière f, lemonade limonade f, dessert dessert m,
breakfast déjeuner m, lunch repas m, dinner dîner m, meal plat m, recipe recette f, kitchen cuisine f, restaurant
restaurant m, waiter serveur m, waitress serveuse f, cook cuisinier m, chef chef m, menu menu m, bakery boulangerie
f, fork fourchette f, spoon cuillère f, plate assiette f, dish mets m, fruit fruit m, vegetable légume m, bean
haricot m, nut noix f, curry curry m, taco taco m, sushi sushi mu, spinach épinard m, garlic ail mu, cabbage chou m,
pumpkin citrouille f, cream crème f, candy bonbon m, toast toast m, café bistro m, snack goûter m""",
    "music": """
guitar guitare f, piano piano m, violin violon m, drum tambour m, flute flûte f, trumpet trompette f, cello
violoncelle m, harp harpe f, saxophone saxophone m, clarinet clarinette f, accordion accordéon m, organ orgue m,
banjo banjo m, song chanson f, melody mélodie f, tune air m, rhythm rythme m, chorus refrain m, lyric parole f,
concert concert m, opera opéra m, orchestra orchestre m, band groupe m, choir chorale f, singer chanteur m, musician
musicien m, pianist pianiste m, drummer batteur m, guitarist guitariste m, violinist violoniste m, conductor
dirigeant m, composer compositeur m, album album m, record disque m, playlist playlist f, radio radio f, symphony
symphonie f, sonata sonate f, waltz valse f, ballad ballade f, jazz jazz mu, rock rock mu, rap rap mu, blues blues
mu, music musique fu, festival festival m, microphone micro m, speaker enceinte f, amplifier ampli m, stage scène f,
dance danse f, dancer danseur m, voice voix f, note note f, chord accord m, duet duo m, solo solo m, anthem hymne m,
lullaby berceuse f, performance prestation f, rehearsal répétition f, audience public m, tambourine tambourin m,
xylophone xylophone m, harmonica harmonica m, keyboardist claviériste m, karaoke karaoké mu, tenor ténor m, soprano
soprano f""",
    "sport": """
football football mu, soccer foot mu, tennis tennis mu, basketball basket mu, volleyball volley mu, rugby rugby mu,
hockey hockey mu, golf golf mu, boxing boxe fu, swimming natation fu, cycling cyclisme mu, skiing ski mu, judo judo
mu, karate karaté mu, yoga yoga mu, marathon marathon m, race course f, match match m, game partie f, tournament
tournoi m, championship championnat m, final finale f, team équipe f, player joueur m, coach entraîneur m, referee
arbitre m, goalkeeper gardien m, striker attaquant m, captain capitaine m, athlete athlète m, runner coureur m,
swimmer nageur m, boxer boxeur m, cyclist cycliste m, champion champion m, supporter supporter m, ball ballon m,
racket raquette f, bat batte f, net filet m, goal but m, score score m, medal médaille f, trophy trophée m, stadium
stade m, gym gymnase m, pool piscine f, court terrain m, track piste f, jersey maillot m, helmet casque m, whistle
sifflet m, skateboard skate m, surfboard surf m, sprint sprint m, penalty pénalty m, victory victoire f, defeat
défaite f, league ligue f, season saison f, training entraînement m, workout exercice m, club club m, opponent
adversaire m, kayak kayak m, dumbbell haltère m, treadmill tapis m, jump saut m, pitch pelouse f, defender défenseur
m""",
    "travel": """
trip voyage m, journey trajet m, flight vol m, plane avion m, train train m, bus bus m, taxi taxi m, car voiture f,
boat bateau m, ship navire m, ferry ferry m, bicycle vélo m, bike bicyclette f, motorcycle moto f, tram tram m,
subway métro m, airport aéroport m, station gare f, port port m, hotel hôtel m, hostel auberge f, motel motel m,
resort complexe m, suitcase valise f, backpack sac m, luggage bagage mu, passport passeport m, visa visa m, ticket
billet m, map carte f, guidebook guide m, tourist touriste m, traveler voyageur m, passenger passager m, pilot
pilote m, driver conducteur m, beach plage f, island île f, mountain montagne f, lake lac m, river rivière f, desert
désert m, forest forêt f, castle château m, museum musée m, cathedral cathédrale f, monument monument m, bridge pont
m, tower tour f, village village m, city ville f, country pays m, border frontière f, tour excursion f, cruise
croisière f, holiday vacances fp, vacation congé m, adventure aventure f, souvenir souvenir m, postcard
carte~postale f, campsite camping m, tent tente f, compass boussole f, road route f, highway autoroute f, seat siège
m, cabin cabine f, harbor havre m, itinerary itinéraire m, landscape paysage m, reservation réservation f,
destination destination f, truck camion m, scooter scooter m, wagon wagon m, statue statue f, view vue f""",
    "technology": """
computer ordinateur m, laptop portable m, phone téléphone m, smartphone smartphone m, tablet tablette f, screen
écran m, keyboard clavier m, mouse souris f, printer imprimante f, camera caméra f, robot robot m, drone drone m,
battery batterie f, charger chargeur m, cable câble m, headphones écouteurs mp, microchip puce f, processor
processeur m, server serveur m, network réseau m, internet internet mu, website site m, app appli f, software
logiciel m, program programme m, code code m, password identifiant m, email courriel m, file fichier m, folder
dossier m, database base f, virus virus m, bug bogue m, update version f, download téléchargement m, video vidéo f,
television télé f, console console f, joystick manette f, modem modem m, router routeur m, satellite satellite m,
rocket fusée f, engine moteur m, machine machine f, gadget gadget m, device appareil m, sensor capteur m, scanner
scanner m, projector projecteur m, algorithm algorithme m, browser navigateur m, engineer ingénieur m, developer
développeur m, programmer programmeur m, hacker pirate m, startup start-up f, antenna antenne f, calculator
calculatrice f, remote télécommande f, monitor moniteur m, chatbot chatbot m, button bouton m, webcam webcam f, tool
outil m, circuit circuit m, laser laser m, telescope télescope m""",
    "animals": """
dog chien m, cat chat m, horse cheval m, cow vache f, pig cochon m, sheep mouton m, goat chèvre f, hen poule f, duck
canard m, goose oie f, rabbit lapin m, hamster hamster m, rat rat m, bird oiseau m, parrot perroquet m, pigeon
pigeon m, eagle aigle m, owl hibou m, crow corbeau m, swan cygne m, penguin pingouin m, fish poisson m, shark requin
m, whale baleine f, dolphin dauphin m, octopus pieuvre f, crab crabe m, turtle tortue f, frog grenouille f, snake
serpent m, lizard lézard m, crocodile crocodile m, lion lion m, tiger tigre m, leopard léopard m, bear ours m, wolf
loup m, fox renard m, deer cerf m, squirrel écureuil m, hedgehog hérisson m, monkey singe m, gorilla gorille m,
elephant éléphant m, giraffe girafe f, zebra zèbre m, camel chameau m, kangaroo kangourou m, koala koala m, panda
panda m, bee abeille f, butterfly papillon m, spider araignée f, ant fourmi f, mosquito moustique m, fly mouche f,
snail escargot m, worm ver m, puppy chiot m, kitten chaton m, pony poney m, donkey âne m, bull taureau m, calf veau
m, rooster coq m, turkey dinde f, peacock paon m, flamingo flamant m, zoo zoo m, farm ferme f, nest nid m, cage cage
f, aquarium aquarium m, vet vétérinaire m, pet animal m, feather plume f, seal phoque m""",
    "health": """
doctor médecin m, nurse infirmière f, dentist dentiste m, surgeon chirurgien m, patient patient m, pharmacist
pharmacien m, hospital hôpital m, clinic clinique f, pharmacy pharmacie f, ambulance ambulance f, medicine
médicament m, pill pilule f, syrup sirop m, vaccine vaccin m, injection piqûre f, bandage bandage m, operation
opération f, surgery chirurgie fu, treatment traitement m, therapy thérapie f, therapist thérapeute m, diet régime
m, vitamin vitamine f, disease maladie f, illness mal m, fever fièvre f, cough toux f, flu grippe f, cold rhume m,
headache migraine f, pain douleur f, injury blessure f, wound plaie f, infection infection f, allergy allergie f,
symptom symptôme m, diagnosis diagnostic m, prescription ordonnance f, appointment consultation f, checkup bilan m,
heart cœur m, lung poumon m, stomach estomac m, brain cerveau m, knee genou m, shoulder épaule f, back dos m, tooth
dent f, bone os m, muscle muscle m, skin peau fu, blood sang mu, eye œil m, ear oreille f, throat gorge f, ankle
cheville f, wrist poignet m, wheelchair fauteuil~roulant m, crutch béquille f, thermometer thermomètre m, sleep
sommeil mu, stress stress mu, massage massage m, health santé fu, hygiene hygiène fu, antibiotic antibiotique m,
physiotherapist kiné m, cancer cancer mu""",
    "money": """
money argent mu, bank banque f, bill facture f, coin pièce f, cash espèces fp, wallet portefeuille m, purse bourse
f, account compte m, loan prêt m, debt dette f, credit crédit m, tax impôt m, salary salaire m, wage paie f, bonus
prime f, budget budget m, price prix m, cost coût m, fee frais mp, fine amende f, rent loyer m, mortgage hypothèque
f, insurance assurance f, pension retraite f, savings économies fp, investment placement m, investor investisseur m,
stock action f, bond obligation f, market marché m, profit bénéfice m, loss perte f, sale vente f, discount remise
f, refund remboursement m, receipt reçu m, invoice devis m, cheque chèque m, payment paiement m, deposit dépôt m,
transfer virement m, interest intérêt m, currency devise f, dollar dollar m, euro euro m, banker banquier m,
accountant comptable m, economist économiste m, economy économie f, inflation inflation fu, business affaire f,
company entreprise f, shop boutique f, store magasin m, customer client m, seller vendeur m, buyer acheteur m,
contract contrat m, lottery loterie f, treasure trésor m, gold or mu, safe coffre m, donation don m, charity œuvre
f, expense dépense f, income revenu m, auction enchère f, broker courtier m, cashier caissier m, bargain aubaine f""",
    "home": """
house maison f, apartment appartement m, flat studio m, room chambre f, bedroom chambrette f, bathroom salle~de~bain
f, garden jardin m, garage garage m, roof toit m, wall mur m, floor plancher m, ceiling plafond m, door porte f,
window fenêtre f, stair escalier m, balcony balcon m, terrace terrasse f, chimney cheminée f, fence clôture f, gate
portail m, table table f, chair chaise f, sofa canapé m, armchair fauteuil m, bed lit m, mattress matelas m, pillow
oreiller m, blanket couverture f, sheet drap m, curtain rideau m, carpet moquette f, rug tapisserie f, lamp lampe f,
candle bougie f, mirror miroir m, shelf étagère f, drawer tiroir m, cupboard placard m, wardrobe armoire f, desk
bureau m, fridge frigo m, oven four m, stove cuisinière f, dishwasher lave-vaisselle m, sink évier m, shower douche
f, bath bain m, towel serviette f, soap savon m, broom balai m, vacuum aspirateur m, heater radiateur m, key clé f,
lock serrure f, bell sonnette f, basket panier m, bucket seau m, vase vase m, clock horloge f, neighbor voisin m,
landlord propriétaire m, furniture mobilier mu, cushion coussin m, lawn gazon m, plant plante f, attic grenier m,
cellar cave f, tap robinet m, toilet toilettes fp""",
    "weather": """
weather météo fu, rain pluie fu, snow neige fu, sun soleil m, wind vent m, storm tempête f, thunder tonnerre mu,
lightning éclair m, cloud nuage m, fog brouillard mu, ice glace fu, hail grêle fu, rainbow arc-en-ciel m, hurricane
ouragan m, tornado tornade f, flood inondation f, drought sécheresse f, heatwave canicule f, frost gel mu,
temperature température f, forecast prévision f, climate climat m, sky ciel m, breeze brise f, sunshine
ensoleillement mu, sunset crépuscule m, sunrise aube f, summer été m, winter hiver m, spring printemps m, autumn
automne m, umbrella parapluie m, raincoat imperméable m, moon lune f, star étoile f, shade ombre f, puddle flaque f""",
    "things": """
book livre m, letter lettre f, newspaper journal m, magazine magazine m, novel roman m, story histoire f, poem poème
m, movie film m, film film m, picture image f, painting tableau m, photo photo f, pen stylo m, pencil crayon m,
notebook cahier m, paper papier m, box boîte f, bag sac~à~main m, bottle bouteille f, cup tasse f, glass verre m,
knife couteau m, gift cadeau m, toy jouet m, doll poupée f, kite cerf-volant m, puzzle puzzle m, hat chapeau m,
shirt chemise f, jacket veste f, coat manteau m, dress robe f, skirt jupe f, sweater pull m, scarf écharpe f, glove
gant m, shoe chaussure f, boot botte f, sock chaussette f, belt ceinture f, ring bague f, necklace collier m, watch
montre f, flower fleur f, rose rose f, tree arbre m, leaf feuille f, stone pierre f, lesson leçon f, class cours m,
exam examen m, school école f, teacher professeur m, student étudiant m, job travail m, meeting réunion f, boss
patron m, colleague collègue m, party fête f, wedding mariage m, idea idée f, project projet m, question question f,
answer réponse f, problem problème m, day jour m, night nuit f, evening soirée f, morning matin m, week semaine f,
weekend week-end m, year année f, place endroit m, town bourg m, street rue f, park parc m, library bibliothèque f,
theater théâtre m, cinema cinéma m, church église f, baby bébé m, child enfant m, boy garçon m, girl fille f, man
homme m, woman femme f, family famille f, friend ami m, service service m, staff personnel m, quality qualité f,
delivery livraison f, product produit m, package colis m, experience expérience f, show spectacle m, actor acteur m""",
}

COLOURS = """red rouge, blue bleu, green vert, yellow jaune, black noir, white blanc/blanche, brown brun, grey gris, gray gris,
pink rose, purple violet/violette, golden doré, silver argenté"""

# Adjectives that stand before the noun in French: m, m before a vowel, f.
BEFORE = """old vieux vieil vieille, new nouveau nouvel nouvelle, big grand grand grande, large gros gros grosse, small petit
petit petite, little petit petit petite, pretty joli joli jolie"""

POSITIVE = """good bon/bonne, great génial, excellent excellent, wonderful merveilleux, fantastic fantastique, amazing incroyable,
beautiful beau/belle, lovely charmant, nice sympathique, perfect parfait, brilliant brillant, superb superbe,
awesome épatant, delicious délicieux, tasty savoureux, fresh frais/fraîche, friendly amical, kind gentil/gentille,
polite poli, helpful serviable, clean propre, comfortable confortable, cozy douillet/douillette, quiet calme,
peaceful paisible, safe sûr, reliable fiable, fast rapide, quick vif/vive, easy facile, useful utile, cheap
abordable, affordable accessible, modern moderne, elegant élégant, stylish chic/chic, charming ravissant, pleasant
agréable, enjoyable plaisant, fun amusant, funny drôle, interesting intéressant, exciting passionnant, fascinating
fascinant, impressive impressionnant, remarkable remarquable, outstanding exceptionnel/exceptionnelle, magnificent
magnifique, splendid splendide, gorgeous somptueux, marvelous prodigieux, fabulous fabuleux, terrific formidable,
incredible inouï, superior supérieur/supérieure, smart intelligent, clever astucieux, talented talentueux, generous
généreux, honest honnête, loyal loyal, brave courageux, cheerful joyeux, happy heureux, proud fier/fière, calm
serein, healthy sain, strong fort, soft doux/douce, sweet sucré, warm chaleureux, bright lumineux, shiny luisant,
colorful coloré, smooth lisse, precious précieux, valuable estimable, special spécial, unique unique, memorable
mémorable, unforgettable inoubliable, satisfying satisfaisant, refreshing rafraîchissant, relaxing relaxant,
inspiring inspirant, creative créatif/créative, original original, flawless impeccable, efficient efficace,
convenient pratique, spacious spacieux, sturdy robuste, solid solide, powerful puissant, professional
professionnel/professionnelle, attentive attentif/attentive, adorable adorable, cute mignon/mignonne, graceful
gracieux, lucky chanceux, successful réussi, thrilling palpitant, heavenly divin, yummy appétissant, crispy
croustillant, juicy juteux, sunny ensoleillé, welcoming accueillant"""

NEGATIVE = """bad mauvais, terrible terrible, awful affreux, horrible horrible, dreadful effroyable, poor médiocre, disgusting
dégoûtant, nasty infect, ugly laid, dirty sale, filthy crasseux, smelly puant, boring ennuyeux, dull terne, slow
lent, late tardif/tardive, rude impoli, unfriendly hostile, unhelpful désobligeant, lazy paresseux, careless
négligent, stupid stupide, silly ridicule, useless inutile, worthless nul/nulle, broken cassé, damaged endommagé,
faulty défectueux, defective déficient, noisy bruyant, loud assourdissant, expensive cher/chère, overpriced ruineux,
cold froid, bland fade, stale rassis, rotten pourri, bitter amer/amère, sour aigre, salty salé, greasy gras/grasse,
burnt brûlé, raw cru, soggy détrempé, weak faible, fragile fragile, flimsy bancal, uncomfortable inconfortable,
unpleasant désagréable, disappointing décevant, frustrating frustrant, annoying agaçant, irritating irritant,
confusing déroutant, complicated compliqué, difficult difficile, dangerous dangereux, scary effrayant, frightening
terrifiant, creepy sinistre, sad triste, angry fâché, upset contrarié, tired fatigué, sick malade, ill souffrant,
hungry affamé, lonely seul, jealous jaloux/jalouse, cruel cruel/cruelle, mean méchant, selfish égoïste, dishonest
malhonnête, greedy avide, arrogant arrogant, violent violent, aggressive agressif/agressive, toxic toxique,
unhealthy malsain, painful douloureux, crowded bondé, messy désordonné, dusty poussiéreux, rusty rouillé, outdated
démodé, unreliable douteux, unsafe risqué, unfair injuste, wrong faux/fausse, fake factice, tasteless insipide,
mediocre quelconque, pathetic pitoyable, miserable misérable, depressing déprimant, gloomy sombre, tragic tragique,
shocking choquant, embarrassing gênant, ridiculous grotesque, outrageous scandaleux, unacceptable inacceptable,
unbearable insupportable, horrendous abominable, inferior inférieur/inférieure, tedious fastidieux, worn usé, torn
déchiré, sticky collant, moldy moisi, chaotic chaotique, hopeless désespéré, nervous nerveux, worried
inquiet/inquiète, disappointed déçu, unhappy malheureux"""

# Adverbs before an adjective, with their French.
ADVERBS = """very très, really vraiment, so si, extremely extrêmement, quite assez, incredibly incroyablement, absolutely
absolument, truly sincèrement, rather plutôt, totally totalement"""

# past base participle; any object.
VERBS = """bought buy acheté, sold sell vendu, found find trouvé, lost lose perdu, saw see vu, made make fait, took take pris,
wanted want voulu, brought bring apporté, gave give donné, got get eu, kept keep gardé, chose choose choisi, forgot
forget oublié, showed show montré, stole steal volé, sent send envoyé, received receive reçu, borrowed borrow
emprunté, lent lend prêté, rented rent loué, tried try essayé, used use utilisé, painted paint peint, drew draw
dessiné, photographed photograph photographié, cleaned clean nettoyé, washed wash lavé, broke break cassé, repaired
repair réparé, fixed fix arrangé, hid hide caché, ordered order commandé, opened open ouvert, closed close fermé,
described describe décrit, needed need nécessité, mentioned mention mentionné, noticed notice remarqué, touched
touch touché, dropped drop lâché, carried carry porté, pulled pull tiré, pushed push poussé, collected collect
collectionné, followed follow suivi, watched watch regardé, admired admire admiré, missed miss manqué, discovered
discover découvert, moved move déplacé, left leave laissé, offered offer offert, returned return rendu, replaced
replace remplacé, counted count compté, measured measure mesuré, tested test testé, visited visit visité, met meet
rencontré, called call appelé, helped help aidé, heard hear entendu, thanked thank remercié, checked check vérifié,
studied study étudié, read read lu, wrote write écrit, compared compare comparé, protected protect protégé, examined
examine examiné, destroyed destroy détruit"""

TOPIC_VERBS = {
    "food": "ate eat mangé, cooked cook cuisiné, tasted taste goûté, baked bake cuit, served serve servi, shared share partagé, swallowed swallow avalé, drank drink bu",
    "music": "played play joué, composed compose composé, recorded record enregistré, practiced practice répété, sang sing chanté, tuned tune accordé",
    "sport": "won win gagné, kicked kick frappé, threw throw lancé, caught catch attrapé, beat beat battu, supported support soutenu",
    "travel": "booked book réservé, drove drive conduit, explored explore exploré, crossed cross traversé, reached reach atteint, reserved reserve retenu",
    "technology": "installed install installé, charged charge chargé, designed design conçu, built build construit, updated update actualisé, programmed program programmé",
    "animals": "fed feed nourri, adopted adopt adopté, trained train dressé, petted pet caressé, raised raise élevé, rescued rescue sauvé",
    "health": "consulted consult consulté, treated treat soigné, prescribed prescribe prescrit, injured injure blessé, healed heal guéri",
    "money": "paid pay payé, saved save épargné, spent spend dépensé, earned earn gagné, invested invest investi, owed owe dû",
    "home": "decorated decorate décoré, swept sweep balayé, furnished furnish meublé, renovated renovate rénové, built build construit",
    "weather": "predicted predict prédit, feared fear craint, loved love aimé, hated hate détesté",
    "things": "loved love aimé, hated hate détesté, wrapped wrap emballé, threw throw lancé",
}

NAMES = """Anna Tom Marie Paul Nina Omar Lucy Jack Emma Leo Sara Hugo Alice Ben Clara David Eva Felix Grace Henry Ivy James
Kate Liam Maya Noah Olivia Peter Quinn Rosa Sam Tina Victor Wendy Yara Zoe Adam Bella Carlos Diana Eric Fatima
George Hannah Ivan Julia Kevin Laura Martin Nora Oscar Paula Rita Simon Theo Ursula Vera Walter Amir Beth Chloe
Daniel Elena Frank Gina Harry Irene John Karen Lily Max Nadia Oliver Pedro Rachel Sophie Tony Uma Vincent Will
Xavier Yusuf Aisha Brian Celine Diego Esther Fiona Greg Helen Igor Jane Kenji Linda Marco Natalie Otto Petra Ravi
Sandra Thomas Ulrich Viola Wanda Yuki Zach Alex Bruno Camille Dora Edward Florence Gabriel Heidi Isabel Jonas Klara
Louis Mona Nick Odette Philip Robert Stella Tim Valerie William Yasmin Zara Ahmed Bob Carol Dylan Ella Fred Gloria
Hassan Inès Joe Kim Luca Mia Nathan Ali Charlie Jenny Mark Mary Mike Steve Susan Lucas Sarah Chris Amy""".split()

CITIES = """Paris=Paris London=Londres Rome=Rome Berlin=Berlin Madrid=Madrid Lisbon=Lisbonne Vienna=Vienne Prague=Prague
Dublin=Dublin Brussels=Bruxelles Amsterdam=Amsterdam Geneva=Genève Zurich=Zurich Milan=Milan Venice=Venise
Naples=Naples Florence=Florence Athens=Athènes Moscow=Moscou Warsaw=Varsovie Budapest=Budapest Oslo=Oslo
Stockholm=Stockholm Copenhagen=Copenhague Helsinki=Helsinki Barcelona=Barcelone Seville=Séville Munich=Munich
Hamburg=Hambourg Lyon=Lyon Nice=Nice Lille=Lille Bordeaux=Bordeaux Marseille=Marseille Toulouse=Toulouse
Edinburgh=Édimbourg Manchester=Manchester Liverpool=Liverpool Oxford=Oxford Boston=Boston Chicago=Chicago
Seattle=Seattle Denver=Denver Miami=Miami Dallas=Dallas Houston=Houston Toronto=Toronto Montreal=Montréal
Vancouver=Vancouver Tokyo=Tokyo Kyoto=Kyoto Osaka=Osaka Seoul=Séoul Beijing=Pékin Shanghai=Shanghai
Singapore=Singapour Bangkok=Bangkok Delhi=Delhi Mumbai=Mumbai Dubai=Dubaï Istanbul=Istanbul Lagos=Lagos
Nairobi=Nairobi Tunis=Tunis Algiers=Alger Lima=Lima Bogota=Bogota Santiago=Santiago Sydney=Sydney
Melbourne=Melbourne Havana=Havane"""

# Places inside a sentence: "in the kitchen" = "dans la cuisine".
PLACES = """kitchen cuisine f, garden jardin m, park parc m, street rue f, house maison f, car voiture f, school école f, museum
musée m, hotel hôtel m, office bureau m, garage garage m, forest forêt f, box boîte f, bag sac m, room chambre f,
village village m, hospital hôpital m, shop boutique f"""

TIMES = """yesterday=hier today=aujourd'hui this~morning=ce~matin last~week=la~semaine~dernière last~night=hier~soir
last~year=l'année~dernière on~Monday=lundi on~Sunday=dimanche on~Friday=vendredi two~days~ago=il~y~a~deux~jours"""

# Subjects other than names: english = french. All are third person singular.
PEOPLE = """my~brother=mon~frère my~sister=ma~sœur my~mother=ma~mère my~father=mon~père my~friend=mon~ami my~son=mon~fils
my~daughter=ma~fille my~wife=ma~femme my~husband=mon~mari my~uncle=mon~oncle my~aunt=ma~tante my~neighbor=mon~voisin
the~teacher=le~professeur the~doctor=le~médecin the~girl=la~fille the~boy=le~garçon the~woman=la~femme
the~man=l'homme the~student=l'étudiant the~child=l'enfant the~king=le~roi the~queen=la~reine the~farmer=le~fermier
the~nurse=l'infirmière my~boss=mon~patron"""
